"""A SiT or discriminator from a published state dict.

The names and shapes of the tensors say what the network is; settings of the training run are used
only for what shapes do not show. Weights load strictly, as float32.

Shapes: C latent channels, D width.
"""

import math
import re

import torch
from torch import Tensor, nn

from models.checks.errors import UserError, short
from models.discriminator import PatchGAN
from models.sit import SiT
from models.sizes import SIZES
from models.weights.loading import load_strictly, require_match
from utils.published.files import State

NUM_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
Q_NORM = "blocks.0.attn.q_norm.weight"


def _fill(net: nn.Module, state: State, origin, what: str) -> None:
    """Give a network on the meta device memory, once all fits, and the weights `state`."""
    require_match(net.state_dict(), state, origin, what)
    load_strictly(net.to_empty(device="cpu"), state, origin, what)


def discriminator_from_state(state: State, origin) -> PatchGAN:
    """The PatchGAN of the depth, width and norm that these weights show."""
    channels, in_channels, *_ = tensor_shape(state, "main.0.weight", origin, 4)
    convolutions = [k for k, v in state.items() if k.startswith("main.") and v.ndim == 4]
    norm = "batch" if any(key.endswith("running_mean") for key in state) else "group"
    layers = max(len(convolutions) - 2, 0)
    with torch.device("meta"):
        try:
            disc = PatchGAN(layers, channels, norm, in_channels=in_channels)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{origin} has shapes of no PatchGAN ({error})") from None
    _fill(disc, state, origin, "the discriminator that its shapes describe")
    return disc


def sit_from_state(
    state: State, config: dict, latent_stats: tuple[Tensor, Tensor] | None, origin
) -> SiT:
    """A SiT with these weights, in eval mode.

    config: from `sit_config`. latent_stats: (mean, std), each (C,), if `state` has no latent norm.
    """
    try:
        with torch.device("meta"):
            sit = SiT(**config)
    # sizes that do not go together, e.g. a width that four does not divide
    except (ArithmeticError, AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{origin} has shapes of no SiT ({short(error)})") from None
    if latent_stats is not None:
        mean, std = latent_stats
        state = state | {"bn.running_mean": mean, "bn.running_var": std.square()}
        state["bn.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    _fill(sit, state, origin, "the SiT that its shapes describe")
    return sit.eval()


def sit_config(state: State, args: dict, num_heads: int | None, origin) -> dict:
    """Arguments of `SiT` for these weights; `args` are settings of the training run.

    num_heads: needed for a width that no published size has. Raises `UserError` without it.
    """
    width, channels, patch, _ = tensor_shape(state, "x_embedder.proj.weight", origin, 4)
    tokens = tensor_shape(state, "pos_embed", origin, 3)[1]
    rows, across = tensor_shape(state, "y_embedder.embedding_table.weight", origin, 2)
    if across != width and rows == width:
        raise UserError(f"{origin} has the label table of a MaskDiT, ({rows}, {across}): no SiT")
    hidden = tensor_shape(state, "blocks.0.mlp.fc1.weight", origin, 2)[0]
    classes = setting(args, "num_classes", max(rows - 1, 1))
    if rows - classes not in (0, 1):
        raise UserError(f"{origin}: {rows} label rows do not fit args.num_classes={classes}")
    depth = len(indices(state, "blocks"))
    dropout = setting(args, "cfg_prob", 0.1)
    num_heads = num_heads or setting(args, "num_heads", 0)
    return {
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth,
        "num_heads": find_num_heads(state, width, num_heads, origin),
        "num_classes": classes,
        "class_dropout_prob": (dropout if dropout < 1 else 0.1) if rows > classes else 0.0,
        "align_depth": min(setting(args, "encoder_depth", 8), depth),
        "qk_norm": Q_NORM in state,
        "mlp_ratio": hidden / width,
    } | projector_config(state, origin)


def indices(state: State, name: str) -> set[str]:
    """The numbers n of all keys that begin with `name.n.`."""
    return {m[1] for key in state if (m := re.match(rf"{name}\.(\d{{1,4}})\.", key))}


def setting(args: dict, name: str, default):
    """A positive number in `args`, with the type of `default`; `default` where there is none."""
    value = args.get(name)
    usable = isinstance(value, int | float) and 0 < value < float("inf")
    return type(default)(value) if usable else default


def find_num_heads(state: State, width: int, asked: int, origin) -> int:
    """Number of attention heads: as asked for (0: not asked), else from the QK norm's size, else
    that of the published size with this width."""
    num_heads = asked or NUM_HEADS.get(width)
    if not asked and Q_NORM in state:
        num_heads = width // tensor_shape(state, Q_NORM, origin, 1)[0]
    if not num_heads or width % num_heads:
        raise UserError(
            f"{origin}: width {width} is of no published size and its number of heads does not "
            f"show in the shapes: give --num-heads, a divisor of {width}"
        )
    return num_heads


def projector_config(state: State, origin) -> dict:
    """Arguments of `SiT` for its projectors: MLPs (REPA), convolutions (iREPA), or none."""
    names = [f"projectors.{k}" for k in sorted(indices(state, "projectors"), key=int)]
    if not names:
        return {"encoder_dims": []}
    if all(f"{name}.weight" in state for name in names):
        dims = [tensor_shape(state, f"{name}.weight", origin, 4)[0] for name in names]
        return {"encoder_dims": dims, "projector": "conv"}
    dims = [tensor_shape(state, f"{name}.4.weight", origin, 2)[0] for name in names]
    inner = tensor_shape(state, "projectors.0.0.weight", origin, 2)[0]
    return {"encoder_dims": dims, "projector": "mlp", "projector_dim": inner}


def tensor_shape(state: State, key: str, origin, ndim: int) -> torch.Size:
    """Shape of a tensor that must be there, with `ndim` dimensions, none of them empty."""
    if key not in state or state[key].ndim != ndim or 0 in state[key].shape:
        known = "a SiT or a discriminator as published"
        raise UserError(f"{origin} has no {key} of {ndim} dimensions: expected {known}")
    return state[key].shape
