"""From the conventions of the original SiT release (arXiv 2401.08740) to those of REPA-E.

The original SiT has a last layer that also predicts a variance ("learn_sigma"), and it counts
time the other way: t = 1 is data, and v = data - noise. Its interpolants have other names.

The tensors of a SiT are the same either way. What proves that t = 0 is data:

- `projectors.*`: the heads of REPA and REPA-E. The original SiT has none.
- `bn.*`: the latent norm of REPA-E.
- `decoder_blocks.*`: how the first release of REPA named the blocks behind the aligned one.
- settings of REPA's training: prediction v, enc_type, proj_coeff, encoder_depth.

and what proves that t = 1 is data:

- settings in the words of SiT's transport: path_type Linear, GVP or VP, prediction velocity, noise
  or score, loss_weight, train_eps, sample_eps.
- where nothing speaks for t = 0: a variance head, which no SiT of REPA has, with the name SiT (of
  the settings' model, of the class in a config.json, or else of the file); the name LightningDiT,
  which is a SiT where its additions are switched off. A path_type in REPA's words (linear, cosine)
  proves nothing, as others use them, too; but with one no name does.

No proof is a variance head alone (DiT has it, too), the name SiT alone (REPA's networks are called
so), or that a file has none of these: an EMA that is shared without its projectors looks like a SiT
that was trained without the variance. Without a proof, or with proofs of both, the user has to say
it: the weights can be turned exactly, but turned wrongly they sample noise.

A DiT has SiT's tensors too, but predicts noise, at times of 0 to 999. It is known by its name
alone.

Shapes: C latent channels, p patch size, D width.
"""

import math
import re

import torch

from models.checks.errors import UserError
from models.sit import SiT
from utils.published.files import PublishedFile, State
from utils.published.networks import indices, tensor_shape

# settings of a training run that only one of the two code bases has: by name, and by value
REPA_SETTINGS = ("enc_type", "proj_coeff", "encoder_depth")
REPA_VALUES = {"prediction": ("v",)}
REPA_PATHS = ("linear", "cosine")
SIT_SETTINGS = ("loss_weight", "train_eps", "sample_eps")
SIT_VALUES = {"path_type": ("Linear", "GVP", "VP"), "prediction": ("velocity", "noise", "score")}
REPA_PARTS = ("projectors", "bn", "decoder_blocks")
NAMES = re.compile(r"(?<![a-z])(lightningdit|sit|dit)(?![a-z])")

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


def data_is_at_one(published: PublishedFile, time: str = "auto") -> tuple[bool, str]:
    """(whether t = 1 is data, how that is known) for the SiT of a file; `time` is that of --time.
    Raises `UserError` where neither `time` nor the file says it."""
    if time != "auto":
        return time == "sit", f"--time {time}"
    at_zero, at_one = proofs(published)
    if bool(at_zero) == bool(at_one):
        why = "nothing in the file shows it"
        if at_zero:
            why = f"{', '.join(at_zero)} speak for t = 0, but {', '.join(at_one)} for t = 1"
        elif network_name(published) == "dit":
            why += " (by its name it is a DiT: most predict noise, which cannot be sampled here)"
        elif predicts_variance(published.sit or {}, published.path):
            why += " (it may even be a DiT, which predicts noise and cannot be sampled here)"
        raise UserError(
            f"{published.path}: is t = 0 data, as in REPA and REPA-E, or t = 1, as in the original "
            f"SiT? {why}: give --time repa or --time sit"
        )
    return bool(at_one), ", ".join(at_zero or at_one)


def proofs(published: PublishedFile) -> tuple[list[str], list[str]]:
    """What proves that t = 0 is data, and what that t = 1 is (see above), in words."""
    state, args = published.sit or {}, published.args
    parts = {key.split(".", 1)[0] for key in state}
    at_zero = [f"{part}.*" for part in REPA_PARTS if part in parts]
    at_zero += _settings(args, REPA_SETTINGS, REPA_VALUES)
    at_one = _settings(args, SIT_SETTINGS, SIT_VALUES)
    if at_zero or args.get("path_type") in REPA_PATHS:
        return at_zero, at_one
    name = network_name(published)
    if name == "lightningdit":
        at_one.append("the name LightningDiT")
    if name == "sit" and predicts_variance(state, published.path):
        at_one.append("the name SiT with a variance head")
    return at_zero, at_one


def _settings(args: dict, names: tuple[str, ...], values: dict[str, tuple[str, ...]]) -> list[str]:
    found = [name for name in names if name in args]
    found += [name for name, known in values.items() if args.get(name) in known]
    return [f"{name}={args[name]}" for name in found]


def network_name(published: PublishedFile) -> str:
    """ "sit", "dit" or "lightningdit", as the settings call the network, or else the file; "" if
    they call it something else."""
    known = (published.args.get(name) for name in ("model", "model_type", "_class_name"))
    words = [str(word) for word in known if word] or [published.path.name]
    match = NAMES.search(" ".join(words).replace("Transformer2DModel", "").lower())
    return match[1] if match else ""


def is_dit(published: PublishedFile) -> bool:
    """Whether a network that has SiT's tensors is a DiT, which predicts noise, by its name."""
    return network_name(published) == "dit" and not any(proofs(published))


def aligned_block(state: State) -> int | None:
    """The number of blocks before the projectors, where the first release of REPA shows it."""
    return len(indices(state, "blocks")) if indices(state, "decoder_blocks") else None


def with_todays_names(state: State) -> State:
    """The same under the names of REPA-E, without projectors of a kind that is not known here. The
    first release of REPA called the blocks behind the projectors `decoder_blocks.*`, counted anew;
    iREPA has `projection_layer.` in the names of its projectors."""
    first = aligned_block(state) or 0
    rename = re.compile(r"^decoder_blocks\.(\d{1,4})\.")
    state = {
        rename.sub(lambda m: f"blocks.{first + int(m[1])}.", key): v for key, v in state.items()
    }
    state = {
        re.sub(r"^(projectors\.\d+)\.projection_layer\.", r"\1.", k): v for k, v in state.items()
    }
    convolution = state.get("projectors.0.weight")
    known = "projectors.0.4.weight" in state or (
        convolution is not None and convolution.shape[2:] == (3, 3)
    )
    return {k: v for k, v in state.items() if known or not k.startswith("projectors.")}


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
