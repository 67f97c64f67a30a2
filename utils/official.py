"""Reading what others published: REPA-E, REPA and SiT checkpoints, VAE files, latent statistics.

Nothing is executed from a pickle: `torch.load(weights_only=True)`, with `argparse.Namespace` (a bag
of plain values, in every training checkpoint) as the only class beyond torch's own tensors.
Networks are described by the shapes of their tensors, and load strictly.

C latent channels, p patch, D width.
"""

import argparse
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.discriminator import PatchGAN
from models.errors import UserError
from models.sit import SIZES, SiT
from models.vae import VAE, VAES, build_vae
from models.vae_keys import infer_config, require_match, to_diffusers

PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # of DDP and of torch.compile
HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
# interpolants under the names of REPA-E and of SiT, and the targets that are velocities
PATHS = {"linear": "linear", "cosine": "cosine", "Linear": "linear", "GVP": "cosine"}
VELOCITY = ("v", "velocity")
VAE_EXTRAS = ("foundation_model.", "linear_proj.")  # VA-VAE's teacher, beside the autoencoder

State = dict[str, Tensor]


@dataclass
class Published:
    """One published file: state dicts by what they are (None: not in it), and its settings."""

    model: State | None = None
    ema: State | None = None
    vae: State | None = None
    discriminator: State | None = None
    args: dict = field(default_factory=dict)
    step: int = 0


# --------------------------------------------------------------------------------------
# Files.


def read_published(path: Path) -> Published:
    """A training checkpoint, a bare or wrapped SiT, or a VAE; `UserError` if it is none of them."""
    content = unpickle(path)
    wrapped = content.get("state_dict")
    bare = wrapped if isinstance(wrapped, dict) else content
    if bare and all(isinstance(value, Tensor) for value in bare.values()):
        state = tensors(bare, path)
        kind = "vae" if "encoder.conv_in.weight" in state else "model"
        return Published(**{kind: state})
    names = [name for name in ("model", "ema", "vae", "discriminator") if content.get(name)]
    if not {"model", "ema"} & set(names):
        keys = ", ".join(map(str, list(content)[:8]))
        raise UserError(
            f"{path} holds {keys or 'nothing'}: expected a training checkpoint (model, ema, ...), "
            "a state dict of a SiT, or one of a VAE"
        )
    parts = {name: tensors(content[name], f"{name} of {path}") for name in names}
    step = content.get("steps", 0)
    step = step if type(step) is int and step >= 0 else 0
    return Published(**parts, args=plain_args(content.get("args")), step=step)


def unpickle(path: Path) -> dict:
    """A .pt or .safetensors as a dict of tensors and plain values, on the CPU."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a downloaded checkpoint")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped: the optimizers' moments, most of a checkpoint, are then never read
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}); download it again") from None
    except Exception as error:  # a hostile file makes the restricted unpickler raise anything
        raise UserError(
            f"{path} is refused, and nothing of it was executed: {reason(error)}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def reason(error: Exception) -> str:
    """What was wrong with a pickle, in a few words."""
    names = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if names:
        return f"it asks for {names[0]}, which is neither a tensor nor a plain value"
    first = (str(error).splitlines() or [""])[0]
    return f"not a file of tensors and plain values ({type(error).__name__}: {first[:120]})"


def tensors(state, what) -> State:
    """A state dict without the prefixes of wrappers; `UserError` if anything in it is no tensor."""
    wrong = not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values())
    if wrong or not state:
        raise UserError(f"{what} is not a state dict: expected a dict of tensors")
    return {PREFIXES.sub("", str(key)): value for key, value in state.items()}


def plain_args(args) -> dict:
    """The settings of a training run, as far as JSON can hold them."""
    known = vars(args) if isinstance(args, argparse.Namespace) else args
    known = known if isinstance(known, dict) else {}
    return {str(k): v for k, v in known.items() if isinstance(v, str | int | float | None)}


def read_stats(path: Path) -> tuple[Tensor, Tensor]:
    """Per-channel (mean, std), (C,) float32, of a NAME-latents-stats.pt: {latents_scale = 1/std,
    latents_bias = mean} of REPA-E, or {mean, std} of LightningDiT, each (1, C, 1, 1)."""
    content = unpickle(path)
    if {"latents_scale", "latents_bias"} <= set(content):
        mean, std = content["latents_bias"], 1 / content["latents_scale"]
    elif {"mean", "std"} <= set(content):
        mean, std = content["mean"], content["std"]
    else:
        raise UserError(f"--stats {path} holds {', '.join(map(str, content))}: expected "
                        "latents_scale and latents_bias")  # fmt: skip
    mean, std = (torch.as_tensor(value).float().flatten() for value in (mean, std))
    if len(mean) != len(std) or not mean.isfinite().all() or not (std.isfinite() & (std > 0)).all():
        raise UserError(f"--stats {path}: expected as many finite means as positive finite scales")
    return mean, std


# --------------------------------------------------------------------------------------
# Networks.


def float_copy(state: State) -> State:
    """float32 where floating point; memory of its own, off the mapped file."""
    return {
        k: v.to(torch.float32 if v.is_floating_point() else v.dtype, copy=True).contiguous()
        for k, v in state.items()
    }


def build_official_vae(state: State, origin) -> VAE:
    """The VAE that holds these weights, of any key dialect; strict."""
    state = {k: v for k, v in to_diffusers(state).items() if not k.startswith(VAE_EXTRAS)}
    with torch.device("meta"):
        vae = known_architecture(state) or VAE(
            AutoencoderKL.from_config(infer_config(state, origin))
        )
    require_match(vae.net.state_dict(), state, origin, "the VAE that its shapes tell")
    vae.net.load_state_dict(float_copy(state), strict=True, assign=True)
    return vae.eval()


def known_architecture(state: State) -> VAE | None:
    """That of our table with just these tensors: it knows the norm groups, which shapes do not."""
    shapes = {key: value.shape for key, value in state.items()}
    for name in {row.architecture: name for name, row in VAES.items()}.values():
        vae = build_vae(name)
        if {key: value.shape for key, value in vae.net.state_dict().items()} == shapes:
            return vae
    return None


def build_official_disc(state: State, origin) -> PatchGAN:
    """A PatchGAN of the depth, width and norm that its weights show; strict."""
    indices = [int(m[1]) for key in state if (m := re.match(r"main\.(\d+)\.", key))]
    first = shape(state, "main.0.weight", origin, 4)
    norm = "batch" if any(key.endswith("running_mean") for key in state) else "group"
    layers = max((max(indices) - 2) // 3, 0)
    disc = PatchGAN(layers, first[0], norm, in_channels=first[1])
    require_match(disc.state_dict(), state, origin, "the discriminator that its shapes tell")
    disc.load_state_dict(float_copy(state), strict=True)
    return disc


def shape(state: State, key: str, origin, ndim: int) -> torch.Size:
    """Of a tensor that must be there; `UserError` without it."""
    if key not in state or state[key].ndim != ndim:
        raise UserError(
            f"{origin} has no {key} of {ndim} dimensions: neither a SiT nor a discriminator as "
            "published"
        )
    return state[key].shape


def setting(args: dict, name: str, default):
    """A number of `args`; the default where it is missing, None, 0 or no number."""
    value = args.get(name)
    return type(default)(value) if isinstance(value, int | float) and value > 0 else default


def sit_config(state: State, args: dict, num_heads: int | None, origin) -> dict:
    """Arguments of `SiT` for these weights: shapes first, `args` for what shapes do not show.

    num_heads: for a width that is not in the table of sizes. Raises `UserError` where it is needed.
    """
    width, channels, patch, _ = shape(state, "x_embedder.proj.weight", origin, 4)
    tokens = shape(state, "pos_embed", origin, 3)[1]
    rows = shape(state, "y_embedder.embedding_table.weight", origin, 2)[0]
    classes = setting(args, "num_classes", max(rows - 1, 1))
    if rows - classes not in (0, 1):
        raise UserError(f"{origin}: {rows} label rows do not fit args.num_classes={classes}")
    depth = len({m[1] for key in state if (m := re.match(r"blocks\.(\d+)\.", key))})
    hidden = shape(state, "blocks.0.mlp.fc1.weight", origin, 2)[0]
    q_norm = state.get("blocks.0.attn.q_norm.weight")
    heads = num_heads or setting(args, "num_heads", 0)
    return {
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": depth,
        "num_heads": count_heads(width, q_norm, heads, origin),
        "num_classes": classes,
        "class_dropout_prob": setting(args, "cfg_prob", 0.1) if rows > classes else 0.0,
        "align_depth": min(setting(args, "encoder_depth", 8), depth),
        "qk_norm": q_norm is not None,
        "mlp_ratio": hidden / width,
    } | projector_config(state)


def count_heads(width: int, q_norm: Tensor | None, asked: int, origin) -> int:
    heads = asked or (width // len(q_norm) if q_norm is not None else HEADS.get(width))
    if not heads or width % heads:
        raise UserError(
            f"{origin}: width {width} is of no published size and its number of heads does not "
            f"show in the shapes: give --num-heads, a divisor of {width}"
        )
    return heads


def projector_config(state: State) -> dict:
    """Of MLP projectors (REPA) or convolutions (iREPA); without any, no alignment."""
    heads = {m[1] for key in state if (m := re.match(r"projectors\.(\d+)\.", key))}
    names = [f"projectors.{k}" for k in sorted(heads, key=int)]
    if all(f"{name}.weight" in state for name in names):
        dims = [state[f"{name}.weight"].shape[0] for name in names]
        return {"encoder_dims": dims, "projector": "conv"} if names else {"encoder_dims": []}
    dims = [shape(state, f"{name}.4.weight", "the SiT", 2)[0] for name in names]
    inner = shape(state, "projectors.0.0.weight", "the SiT", 2)[0]
    return {"encoder_dims": dims, "projector": "mlp", "projector_dim": inner}


def build_official_sit(state: State, config: dict, stats: tuple | None, origin) -> SiT:
    """A SiT with these weights, and the latent norm `stats` = (mean, std) if they hold none;
    strict."""
    with torch.device("meta"):
        sit = SiT(**config)
    state = float_copy(state)
    if stats is not None:
        count = torch.zeros((), dtype=torch.int64)
        state |= {"bn.running_mean": stats[0].clone(), "bn.running_var": stats[1].square()}
        state |= {"bn.num_batches_tracked": count}
    require_match(sit.state_dict(), state, origin, "the SiT that its shapes tell")
    sit.load_state_dict(state, strict=True, assign=True)
    return sit.eval()


# --------------------------------------------------------------------------------------
# From the conventions of the original SiT release to those of REPA-E.


def predicts_sigma(state: State, origin) -> bool:
    """Whether the last layer answers 2C channels: velocity and, unused in SiT, a variance."""
    _, channels, patch, _ = shape(state, "x_embedder.proj.weight", origin, 4)
    return shape(state, "final_layer.linear.weight", origin, 2)[0] == 2 * patch * patch * channels


def without_sigma(state: State) -> State:
    """Keep the first C of the 2C output channels; SiT's own forward drops the others too."""
    _, channels, patch, _ = state["x_embedder.proj.weight"].shape

    def half(rows: Tensor) -> Tensor:  # (p * p * 2C, ...) => (p * p * C, ...)
        return rows.unflatten(0, (patch * patch, 2 * channels))[:, :channels].flatten(0, 1)

    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    return state | {name: half(state[name]) for name in names if name in state}


def is_original_sit(published: Published) -> bool:
    """No trace of REPA: neither projectors, nor latent norm, nor the settings of its script."""
    state = published.ema or published.model or {}
    ours = any(key.startswith(("projectors.", "bn.")) for key in state)
    return not ours and not {"enc_type", "proj_coeff", "encoder_depth"} & set(published.args)


def reverse_time(state: State, origin) -> State:
    """Weights of a SiT (arXiv 2401.08740, repository willisma/SiT) in which t = 1 is data and
    v = data - noise => of the same function with t = 0 as data and v = noise - data.

    Exact: cos((1-t)w) and sin((1-t)w) are linear in cos(tw) and sin(tw), so the first layer of the
    timestep MLP takes the change of t, and the last layer the sign.
    """
    name = "t_embedder.mlp.0.weight"
    half = shape(state, name, origin, 2)[1] // 2
    k = torch.arange(half, dtype=torch.float64)
    w = torch.exp(-math.log(10000.0) / half * k)
    on_cos, on_sin = state[name].double().split(half, dim=1)  # (D, 128) each
    cos, sin = w.cos(), w.sin()
    turned = torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1)
    last = ("final_layer.linear.weight", "final_layer.linear.bias")
    return state | {name: turned.float()} | {n: -state[n] for n in last if n in state}


def path_of(args: dict, origin) -> str:
    """Interpolant of the run ("linear" where nothing is said); `UserError` for targets and paths
    that no sampler here integrates."""
    path, target = args.get("path_type", "linear"), args.get("prediction", "v")
    if path not in PATHS or target not in VELOCITY:
        raise UserError(
            f"{origin} was trained with path_type={path}, prediction={target}: only "
            f"{', '.join(PATHS)} with prediction v can be sampled here"
        )
    return PATHS[path]
