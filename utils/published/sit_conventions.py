"""From the conventions of the original SiT release (arXiv 2401.08740) to those of REPA-E.

The original SiT has a last layer that may also predict a variance ("learn_sigma"), and it counts
time the other way: t = 1 is data, and v = data - noise. Its interpolants have other names.

Shapes: C latent channels, p patch size, D width.
"""

import math

import torch

from models.checks.errors import UserError
from models.sit import SiT
from utils.published.files import PublishedFile, State
from utils.published.networks import tensor_shape

# interpolants by the names that REPA-E and SiT give them
INTERPOLANTS = {"linear": "linear", "cosine": "cosine", "Linear": "linear", "GVP": "cosine"}
VELOCITY_TARGETS = ("v", "velocity")
LAST_LAYER = ("final_layer.linear.weight", "final_layer.linear.bias")


def predicts_variance(state: State, origin) -> bool:
    """Whether the last layer has 2C output channels: the velocity, and an unused variance."""
    _, channels, patch, _ = tensor_shape(state, "x_embedder.proj.weight", origin, 4)
    rows = tensor_shape(state, LAST_LAYER[0], origin, 2)[0]
    return rows == 2 * patch * patch * channels


def without_variance(state: State) -> State:
    """Keep the first C of the 2C output channels. SiT's own forward drops the others, too."""
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape
    velocity = {  # (p * p * 2C, ...) => (p * p * C, ...)
        name: state[name].unflatten(0, (patch * patch, 2 * channels))[:, :channels].flatten(0, 1)
        for name in LAST_LAYER
        # anything else is left for the strict load to report
        if name in state and state[name].shape[:1] == (patch * patch * 2 * channels,)
    }
    return state | velocity


def is_original_sit(published: PublishedFile) -> bool:
    """Whether a file has no trace of REPA: projectors, latent norm, settings of its training."""
    has_parts = any(key.startswith(("projectors.", "bn.")) for key in published.sit or {})
    return not has_parts and not {"enc_type", "proj_coeff", "encoder_depth"} & set(published.args)


@torch.no_grad()
def reverse_time(sit: SiT) -> None:
    """Turn a SiT with t = 1 as data and v = data - noise into the same function with t = 0 as data
    and v = noise - data, in place.

    Exact: cos((1-t)w) and sin((1-t)w) are linear in cos(tw) and sin(tw), so the first layer of the
    timestep MLP takes the change of t, and the last layer the sign.
    """
    embedder = sit.t_embedder
    half = embedder.frequencies // 2
    k = torch.arange(half, dtype=torch.float64)
    w = torch.exp(-math.log(embedder.max_period) / half * k)
    cos, sin, weight = w.cos(), w.sin(), embedder.mlp[0].weight
    on_cos, on_sin = weight.double().split(half, dim=1)  # (D, 128) each
    weight.copy_(torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1))
    for parameter in sit.final_layer.linear.parameters():
        parameter.neg_()


def interpolant_path(args: dict, origin) -> str:
    """Interpolant of a training run with settings `args`; "linear" where they name none.

    Raises `UserError` for paths and prediction targets that no sampler here integrates.
    """
    path, target = args.get("path_type", "linear"), args.get("prediction", "v")
    if path not in INTERPOLANTS or target not in VELOCITY_TARGETS:
        raise UserError(
            f"{origin} was trained with path_type={path}, prediction={target}: only "
            f"{', '.join(INTERPOLANTS)} with prediction v can be sampled here"
        )
    return INTERPOLANTS[path]
