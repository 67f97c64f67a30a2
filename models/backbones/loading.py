"""timm's networks, empty or with the weights of a file in any layout."""

from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.backbones.layouts import KNOWN, PREFER, to_timm
from models.backbones.matching import check_config, of_state, require_same
from models.backbones.table import EncoderSpec
from models.checks.errors import UserError, short
from models.weights.loading import FLOATS, require_finite
from models.weights.reading import read_state

# timm, which takes seconds to import, is imported in the functions that use it

# endings of the names of what is always a float
FLOAT_NAMES = (".weight", ".bias", "_embed", "_token")


def create_network(spec: EncoderSpec, side: int | None = None, **kwargs) -> Any:
    """The timm network of a row without a classifier, random, for images of `side` pixels if it is
    one whose input has a fixed size; `kwargs` go to timm."""
    import timm

    size = {"img_size": side} if side else {}
    return timm.create_model(spec.timm_name, num_classes=0, **size, **spec.kwargs, **kwargs)


class _NoNumbers(TorchFunctionMode):
    """Leaves out what only fills tensors with numbers: on the meta device that has no effect, but
    takes most of the time in which a network is made."""

    FILLING = ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and getattr(func, "__name__", "") in self.FILLING:
            return args[0]
        return func(*args, **(kwargs or {}))


def network_on_meta(spec: EncoderSpec, side: int | None = None) -> Any:
    """`create_network` on the meta device: shapes without numbers."""
    with torch.device("meta"), _NoNumbers():
        return create_network(spec, side)


def load_network(
    spec: EncoderSpec, path: Path, like: Any, name: str, side: int | None = None
) -> Any:
    """`create_network` with the weights of a file; `UserError` unless they are of this network.

    like: the network, which may be on the meta device. name: what messages call it.
    """
    check_config(path, like, spec, name)
    overlay = {"state_dict": _read(path, like, name), "num_classes": 0, "label_offset": 0}
    try:
        # standard output is closed to timm: its DINOv3 reader prints a line per missing bias
        with redirect_stdout(None):
            net = create_network(spec, side, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm adapts what it is given, and fails wherever it cannot
        raise UserError(
            f"{path} does not fit {name}: {short(error)}; name the network that it is of, or give "
            "another file"
        ) from error
    del net.pretrained_cfg["state_dict"]  # a second copy of the weights
    return net


def _read(path: Path, net: Any, name: str) -> dict[str, Tensor]:
    """State dict of a file for `net`, without a classifier head, under names that timm reads;
    `UserError` unless it is of such a network and holds finite floats."""
    own = list(net.state_dict())
    known = ((own[0], own[-1]), *KNOWN)
    state = to_timm(read_state(path, known=known, prefer=PREFER, what=name), net)
    classifier = net.pretrained_cfg.get("classifier") or ()
    layers = (classifier,) if isinstance(classifier, str) else classifier
    # `proj`: where CLIP and PE project into the space shared with text
    heads = (*(f"{layer}." for layer in layers), "proj.", "visual.proj.")
    state = {name: value for name, value in state.items() if not f"{name}.".startswith(heads)}
    if hasattr(net, "num_prefix_tokens"):
        require_same(of_state(state), net, path, name)
    _require_floats(state, path)
    return state


def _require_floats(state: Mapping[str, Tensor], path: Path) -> None:
    """`UserError` unless all weights are finite floats."""
    for name, value in state.items():
        if name.endswith(FLOAT_NAMES) and value.dtype not in FLOATS:
            raise UserError(f"weights of {path}: tensor {name} holds {value.dtype}, not floats")
    require_finite(state, path)
