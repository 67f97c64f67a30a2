"""Numbers into a network: names, shapes and kinds of numbers must be those of the network."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.checks.errors import UserError

# types in which weights are stored that are floats here
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_strictly(net: nn.Module, state: Mapping[str, Tensor], origin, what: str) -> None:
    """Copy `state` into `net`; `UserError` unless it has exactly the network's tensors and shapes,
    and finite numbers.

    A network on the meta device takes the tensors themselves, cast to its own dtypes, in place of a
    copy. `origin` and `what` name the weights and the network in the message.
    """
    expected = net.state_dict()
    require_match(expected, state, origin, what)
    require_finite(state, origin)
    on_meta = any(value.is_meta for value in expected.values())
    if on_meta:
        state = {name: value.to(expected[name].dtype) for name, value in state.items()}
    net.load_state_dict(state, strict=True, assign=on_meta)


def require_match(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], origin, what: str):
    """`UserError` unless both have the same keys, shapes and kinds of numbers: a float is no whole
    number, and eight bits make no float. Lists the first three of each kind of fault."""
    both = [k for k in expected if k in state]
    wrong = [k for k in both if expected[k].shape != state[k].shape]
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(expected[k].shape)}" for k in wrong]
    other = [k for k in both if not _same_numbers(expected[k].dtype, state[k].dtype)]
    kinds = {
        "missing": [k for k in expected if k not in state],
        "unexpected": [k for k in state if k not in expected],
        "of another shape": shapes,
        "of another type": [f"{k} {state[k].dtype} for {expected[k].dtype}" for k in other],
    }
    found = [f"{len(keys)} {kind} ({first_names(keys)})" for kind, keys in kinds.items() if keys]
    if found:
        raise UserError(f"weights of {origin} do not fit {what}: tensors {'; '.join(found)}")


def first_names(keys: list[str], count: int = 3, length: int = 100) -> str:
    """The first names of a list, each cut."""
    shown = [key if len(key) <= length else f"{key[:length]}..." for key in keys[:count]]
    return ", ".join(shown + ["..."] * (len(keys) > count))


def _same_numbers(expected: torch.dtype, found: torch.dtype) -> bool:
    if expected.is_floating_point:
        return found in FLOATS
    broader = found.is_floating_point or found.is_complex or found == torch.bool
    return found == expected or not broader


def require_finite(state: Mapping[str, Tensor], origin) -> None:
    """`UserError` that names the first tensor with NaN or infinity, also once it is float32."""
    for name, value in state.items():
        # one pass without a copy; NaN goes through a minimum, too
        if value.dtype in FLOATS and value.numel():
            smallest, largest = (side.float() for side in value.aminmax())
            if not (smallest.isfinite() and largest.isfinite()):
                raise UserError(
                    f"weights of {origin}: tensor {name} holds NaN or infinity; take another file"
                )


def count(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())
