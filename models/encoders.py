"""Frozen vision encoders whose patch features the SiT is aligned with. All networks are timm's.

A new encoder is a row of `ENCODERS`; one that timm has can also be used without a row, as
timm:NAME. What timm does not have cannot be used.

`x` image in [-1, 1], (N, 3, H, W); features (N, T, D), T = grid * grid patch tokens, row by row.
The input size follows from the grid (patch 14 and a 16 x 16 grid: 224 px), so that tokens match
those of the SiT.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks.errors import UserError, same_letters, short
from models.layers.autocast import at_least_float32
from models.weights.loading import FLOATS, require_finite
from models.weights.published import WeightFile
from models.weights.reading import is_plain, read_plain

# timm, which takes seconds to import, is imported in the functions that use it

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True)
class EncoderSpec:
    """What a short name stands for: a timm network, and how it is fed and read."""

    # name in timm, with the tag of its weights
    timm_name: str
    # mean and std of each colour channel, for images in [0, 1]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # whether the network's final norm is applied to the patch tokens
    norm: bool = True
    # turns the state dict of the authors' file into one that timm reads; None = timm reads it as is
    convert_keys: Callable[[Mapping], Mapping] | None = None
    # where the authors publish the weights, if timm does not
    url: str = ""
    # further arguments of timm.create_model
    kwargs: dict = field(default_factory=dict)
    # of a CNN, the stage with so many input pixels per cell is used; None = the last stage
    stride: int | None = None


def _moco_base(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MoCo-v3 keeps a base and a momentum network; the base one without its projector is used.
    timm's reader has already removed the outer `module.`."""
    prefix = "base_encoder."
    base = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {k: v for k, v in (base or state).items() if not k.startswith("head.")}


def _no_qkv_bias(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """timm's DINOv3 has no qkv bias, as the published one is zero, and drops that of a file."""
    for key in (k for k in state if k.endswith("qkv.bias")):
        query, _, value = state[key].chunk(3)
        if query.any() or value.any():
            raise UserError(
                f"{key} is not zero, but this network has no such bias: take the _qkvb variant, "
                "e.g. encoder.names=[timm:vit_base_patch16_dinov3_qkvb]"
            )
    return state


def _ijepa_encoder(state: Mapping) -> Mapping:
    """The file holds encoder, target encoder, predictor and optimizer; REPA uses the encoder."""
    return {"encoder": state["encoder"]} if "encoder" in state else state


# where timm and the authors keep the weights in a file, in the order in which they are taken
STATES = ("state_dict_ema", "model_ema", "state_dict", "model")
# endings of the names of what is always a float
FLOAT_NAMES = (".weight", ".bias", "_embed", "_token")

# One line for each group of authors: what all their networks have in common.
# Mean and std are those that the network was trained with, as timm states them (iREPA feeds
# ImageNet's to SigLIP 2). The final norm follows REPA (arXiv 2410.06940): its MAE and CLIP targets
# are outputs of the last block without it, as are those of PE in iREPA (arXiv 2512.10794).
_DINO = partial(EncoderSpec, **IMAGENET)
_DINOV3 = partial(EncoderSpec, **IMAGENET, convert_keys=_no_qkv_bias)
_MAE = partial(EncoderSpec, **IMAGENET, norm=False)
_CLIP = partial(EncoderSpec, **OPENAI, norm=False)
_IJEPA = partial(EncoderSpec, **IMAGENET, convert_keys=_ijepa_encoder)
_SIGLIP2 = partial(EncoderSpec, **HALF)
_PE = partial(EncoderSpec, **HALF, norm=False)
_MOCO = partial(
    EncoderSpec,
    **IMAGENET,
    convert_keys=_moco_base,
    url="https://github.com/facebookresearch/moco-v3",
)

ENCODERS = {
    "dinov2-s": _DINO("vit_small_patch14_dinov2.lvd142m"),
    "dinov2-b": _DINO("vit_base_patch14_dinov2.lvd142m"),
    "dinov2-l": _DINO("vit_large_patch14_dinov2.lvd142m"),
    "dinov2-g": _DINO("vit_giant_patch14_dinov2.lvd142m"),
    "dinov2-reg-s": _DINO("vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-b": _DINO("vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-l": _DINO("vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov2-reg-g": _DINO("vit_giant_patch14_reg4_dinov2.lvd142m"),
    "dinov1-s": _DINO("vit_small_patch16_224.dino"),
    "dinov1-b": _DINO("vit_base_patch16_224.dino"),
    "dinov3-s": _DINOV3("vit_small_patch16_dinov3.lvd1689m"),
    "dinov3-b": _DINOV3("vit_base_patch16_dinov3.lvd1689m"),
    "dinov3-l": _DINOV3("vit_large_patch16_dinov3.lvd1689m"),
    "dinov3-h": _DINOV3("vit_huge_plus_patch16_dinov3.lvd1689m"),
    "mae-b": _MAE("vit_base_patch16_224.mae"),
    "mae-l": _MAE("vit_large_patch16_224.mae"),
    "mae-h": _MAE("vit_huge_patch14_224.mae"),
    "clip-l": _CLIP("vit_large_patch14_clip_quickgelu_224.openai"),
    "ijepa-h": _IJEPA("vit_huge_patch14_gap_224.in1k_ijepa"),
    "ijepa-h-22k": _IJEPA("vit_huge_patch14_gap_224.in22k_ijepa"),
    "siglip2-b": _SIGLIP2("vit_base_patch16_siglip_256.v2_webli"),
    "siglip2-l": _SIGLIP2("vit_large_patch16_siglip_256.v2_webli"),
    "siglip2-so400m": _SIGLIP2("vit_so400m_patch16_siglip_256.v2_webli"),
    "pe-core-b": _PE("vit_pe_core_base_patch16_224.fb"),
    "pe-core-l": _PE("vit_pe_core_large_patch14_336.fb"),
    "pe-spatial-b": _PE("vit_pe_spatial_base_patch16_512.fb"),
    "pe-spatial-l": _PE("vit_pe_spatial_large_patch14_448.fb"),
    "mocov3-s": _MOCO("vit_small_patch16_224", kwargs={"num_heads": 12}),
    "mocov3-b": _MOCO("vit_base_patch16_224"),
    "mocov3-l": _MOCO("vit_large_patch16_224"),
}


class Encoder(nn.Module):
    """A frozen network: always in eval mode, no parameter trains, `forward` under no_grad.

    name: as in `load_encoder`. grid: tokens per side. side: of the network's input, in pixels.
    embed_dim: D, channels of a token. stage: index into timm's feature_info of what is used.
    """

    net: Any  # timm's networks share an interface, but no class
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, net: Any, spec: EncoderSpec, grid: int):
        super().__init__()
        self.name, self.grid, self.norm = name, grid, spec.norm
        self.stage = _stage(net, spec)
        self.side = grid * net.feature_info[self.stage]["reduction"]
        last = self.stage == len(net.feature_info) - 1
        self.embed_dim: int = net.num_features if last else net.feature_info[self.stage]["num_chs"]
        self.net = net
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.train(False)

    @property
    def has_tokens(self) -> bool:
        """Whether it is a transformer, whose input has a fixed size."""
        return _has_tokens(self.net)

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] => (N, T, D) patch tokens, the prefix tokens left out."""
        x = ((at_least_float32(x) + 1) / 2 - self.mean) / self.std
        if x.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            x = F.interpolate(x, size, mode="bicubic", antialias=False, align_corners=False)
        if not _has_tokens(self.net):
            return self._feature_map(x).flatten(2).transpose(1, 2)  # (N, D, h, w)
        if self.norm:
            return self.net.forward_features(x)[:, self.net.num_prefix_tokens :]
        return self.net.forward_intermediates(
            x, indices=1, norm=False, output_fmt="NLC", intermediates_only=True
        )[0]

    def _feature_map(self, x: Tensor) -> Tensor:
        if self.stage == len(self.net.feature_info) - 1:
            return self.net.forward_features(x)
        return self.net.forward_intermediates(
            x, indices=[self.stage], stop_early=True, intermediates_only=True
        )[0]


def load_encoder(
    name: str, weights: str | Path | None = None, resolution: int = 256, grid: int | None = None
) -> Encoder:
    """Load a frozen encoder for images of `resolution` pixels.

    name: key of `ENCODERS`, or timm:NAME for any timm network: a ViT (patch tokens after the final
    norm) or a CNN (last feature map, or with timm:NAME/STRIDE that of the stage with STRIDE input
    pixels per cell); mean and std are then timm's for that network.
    weights: None = the published ones (timm's hub cache, or a download), a local file in timm's or
    the authors' own format (a classifier head in it is dropped, all else must fit exactly), or
    "random" (tests and benchmarks). grid: tokens per side, None = resolution // 16.
    """
    grid, _ = encoder_shape(name, resolution, grid)
    spec = _spec(name)
    file = encoder_weight_file(name, weights)
    if file is None:
        return Encoder(name, _create(spec, grid), spec, grid)
    path = file.fetch()
    state = _read_backbone(path, spec)
    overlay = {"state_dict": state, "num_classes": 0, "label_offset": 0}
    try:
        # standard output is closed to timm: its DINOv3 reader prints a line per missing bias
        with redirect_stdout(None):
            net = _create(spec, grid, pretrained=True, pretrained_cfg_overlay=overlay)
    except UserError:
        raise
    except Exception as error:  # timm adapts what it is given, and fails wherever it cannot
        raise UserError(f"{path} does not fit {name}: {short(error)}") from error
    _require_patches(state, net, path)
    del net.pretrained_cfg["state_dict"]  # a second copy of the weights
    return Encoder(name, net, spec, grid)


def encoder_weight_file(name: str, weights: str | Path | None = None) -> WeightFile | None:
    """The file that `load_encoder` will read, without reading it; None if the weights are random.
    Raises `UserError` if `weights` names none and timm publishes none."""
    if weights == "random":
        return None
    if weights is not None:
        return WeightFile(f"weights of {name}", path=Path(weights), setting="encoder.weights={}")

    spec = _spec(name)
    cfg = _published_config(spec.timm_name)
    if spec.url or not (cfg.hf_hub_id or cfg.url):
        raise UserError(
            f"timm publishes no weights of {name}: get them at {spec.url or 'their authors'}, then "
            "set encoder.weights=FILE"
        )
    if cfg.hf_hub_id:
        file = cfg.hf_hub_filename or "model.safetensors"
        return WeightFile(file, repo=cfg.hf_hub_id, setting="encoder.weights={}")
    return WeightFile(Path(cfg.url).name, url=cfg.url, setting="encoder.weights={}")


def encoder_shape(name: str, resolution: int = 256, grid: int | None = None) -> tuple[int, int]:
    """(grid, D) of `load_encoder` with the same arguments, without weights or memory for them.
    Raises `UserError` for an unknown name, and for a network that cannot give such a grid."""
    if grid is None and resolution % 16:
        raise UserError(f"resolution {resolution} is not a multiple of 16: set encoder.grid")
    grid = grid or resolution // 16
    spec = _spec(name)
    try:
        with torch.device("meta"):
            encoder = Encoder(name, _create(spec, grid), spec, grid)
            feats = encoder(torch.zeros(1, 3, resolution, resolution))
        fits = feats.shape == (1, grid * grid, encoder.embed_dim)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise UserError(f"{name} cannot make {grid} x {grid} tokens: {short(error)}") from error
    if not fits:
        raise UserError(
            f"{name} gives {tuple(feats.shape[1:])}, not the {grid * grid} patch tokens of a "
            f"{grid} x {grid} grid: take a ViT, or a CNN with an (N, C, h, w) feature map"
        )
    return grid, encoder.embed_dim


def largest_grid(name: str, side: int) -> int:
    """The most tokens per side that an image of `side` pixels gives, and 1 if it is smaller."""
    spec = _spec(name)
    with torch.device("meta"):
        encoder = Encoder(name, _create(spec, 1), spec, 1)
    return max(1, side // encoder.side)


def _spec(name: str) -> EncoderSpec:
    if name in ENCODERS:
        return ENCODERS[name]
    if name.startswith("timm:"):
        return _timm_spec(name)
    near = same_letters(name, ENCODERS)
    hint = f"nearest is {near}" if near else f"the names are {', '.join(ENCODERS)}"
    raise UserError(f"unknown encoder {name}: {hint}; any timm network is timm:NAME")


def _timm_spec(name: str) -> EncoderSpec:
    """That of `timm:NAME` or `timm:NAME/STRIDE`."""
    import timm

    timm_name, slash, stride = name.removeprefix("timm:").partition("/")
    known = timm.list_models() + timm.list_pretrained()
    if timm_name not in known:
        near = get_close_matches(timm_name, known, n=1, cutoff=0.8)
        hint = f"in spelling, nearest is timm:{near[0]}" if near else "see timm.list_models()"
        raise UserError(f"unknown encoder {name}: {hint}")
    if slash and not re.fullmatch("[0-9]{1,4}", stride):
        raise UserError(f"encoder {name}: its stride is {stride!r}; write e.g. timm:{timm_name}/16")
    cfg = _published_config(timm_name)
    return EncoderSpec(
        timm_name, tuple(cfg.mean), tuple(cfg.std), stride=int(stride) if stride else None
    )


def _published_config(timm_name: str) -> Any:
    """What timm knows of the published weights of a network: address, mean, std, classifier."""
    import timm

    return timm.get_pretrained_cfg(timm_name)


def _has_tokens(net: Any) -> bool:
    return hasattr(net, "num_prefix_tokens")


def _stage(net: Any, spec: EncoderSpec) -> int:
    """Index into feature_info of the stage whose output is used."""
    strides = [info["reduction"] for info in net.feature_info]
    if spec.stride is None:
        return len(strides) - 1
    if spec.stride not in strides:
        raise UserError(f"{spec.timm_name} has no stage of stride {spec.stride}: it has {strides}")
    return len(strides) - 1 - strides[::-1].index(spec.stride)


def _create(spec: EncoderSpec, grid: int, **kwargs) -> Any:
    """The timm network for `grid` tokens per side, without a classifier; `kwargs` go to timm."""
    import timm

    with torch.device("meta"):
        probe: Any = timm.create_model(spec.timm_name, num_classes=0, **spec.kwargs)
    side = grid * probe.feature_info[_stage(probe, spec)]["reduction"]
    size = {"img_size": side} if _has_tokens(probe) else {}
    return timm.create_model(spec.timm_name, num_classes=0, **size, **spec.kwargs, **kwargs)


def _read_backbone(path: Path, spec: EncoderSpec) -> Mapping[str, Tensor]:
    """State dict of a local file without its classifier head: tensors alone, finite floats."""
    from timm.models import clean_state_dict

    content = read_plain(path)
    content = content if isinstance(content, dict) else {}
    found = next((content[key] for key in STATES if content.get(key)), content)
    state: Mapping = clean_state_dict(_tensors_of(found))
    if not state:
        raise UserError(f"{path} holds no tensors with names: expected weights of {spec.timm_name}")
    state = spec.convert_keys(state) if spec.convert_keys else state
    _require_floats(state, path)
    classifier = _published_config(spec.timm_name).classifier or ()
    layers = (classifier,) if isinstance(classifier, str) else classifier
    # `proj`, `visual.proj`: where CLIP and PE project into the space shared with text
    head = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    return {k: v for k, v in state.items() if k not in head | {"proj", "visual.proj"}}


def _tensors_of(content: object) -> dict:
    """The tensors of a dict, also of dicts in it (I-JEPA's file); nothing else of it."""
    if not isinstance(content, dict):
        return {}
    kept = {str(k): _tensors_of(v) if isinstance(v, dict) else v for k, v in content.items()}
    return {k: v for k, v in kept.items() if (v if isinstance(v, dict) else is_plain(v))}


def _leaves(state: Mapping) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        yield from _leaves(value) if isinstance(value, Mapping) else [(name, value)]


def _require_floats(state: Mapping, path: Path) -> None:
    """`UserError` unless all weights, also in nested dicts, are finite floats."""
    for name, value in _leaves(state):
        if name.endswith(FLOAT_NAMES) and value.dtype not in FLOATS:
            raise UserError(f"weights of {path}: tensor {name} holds {value.dtype}, not floats")
        require_finite({name: value}, path)


def _require_patches(state: Mapping, net: Any, path: Path) -> None:
    """`UserError` if the weights cut images into patches of another size than `net`: timm has
    resampled their first convolution."""
    first = getattr(getattr(net, "patch_embed", None), "proj", None)
    if not isinstance(first, nn.Conv2d):
        return
    for _, value in _leaves(state):
        if value.ndim == 4 and value.shape[1] == 3 and value.shape[2:] != first.weight.shape[2:]:
            sizes = f"{tuple(value.shape[2:])}, this network's {tuple(first.weight.shape[2:])}"
            raise UserError(f"{path} is of another network: its patches are {sizes}")
