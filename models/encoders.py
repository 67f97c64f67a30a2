"""Frozen vision encoders whose patch features the SiT is aligned with. All networks are timm's.

`x` image in [-1, 1], (N, 3, H, W); features (N, T, D), T = grid * grid patch tokens, row by row.
The input size follows from the grid (patch 14 and a 16 x 16 grid: 224 px), so that tokens match
those of the SiT. Whether the final norm is applied follows REPA (arXiv 2410.06940): MAE and CLIP
targets are raw block outputs, as are PE's in iREPA; all others are normalised.
"""

from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, hf_hub_url
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from models.errors import UserError
from models.wanted import Wanted, cached_file, torch_hub_file

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


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
    """Of encoder, target encoder, predictor and optimizer, the first: the one REPA uses."""
    return {"encoder": state["encoder"]} if "encoder" in state else state


@dataclass(frozen=True)
class EncoderSpec:
    timm_name: str
    norm: bool  # apply the network's final norm to the patch tokens
    mean: tuple[float, ...]  # of RGB in [0, 1], per channel
    std: tuple[float, ...]
    key_filter: Callable[[Mapping], Mapping] = dict  # runs before timm's own
    url: str | None = None  # where to get the weights, if not through timm
    kwargs: dict = field(default_factory=dict)  # further arguments of timm.create_model
    stride: int | None = None  # CNN: the stage of this many pixels per cell; None = the last one


# fmt: off
# Mean and std are those that each network was trained with; iREPA feeds ImageNet's to SigLIP 2.
#          norm   mean, std   key filter
DINO    = (True,  *IMAGENET)
DINOV3  = (True,  *IMAGENET, _no_qkv_bias)
MAE     = (False, *IMAGENET)
CLIP    = (False, *OPENAI)
IJEPA   = (True,  *IMAGENET, _ijepa_encoder)
SIGLIP2 = (True,  *HALF)
PE      = (False, *HALF)
MOCO    = (True,  *IMAGENET, _moco_base, "https://github.com/facebookresearch/moco-v3")

ENCODERS = {
    "dinov2-s":       EncoderSpec("vit_small_patch14_dinov2.lvd142m",            *DINO),
    "dinov2-b":       EncoderSpec("vit_base_patch14_dinov2.lvd142m",             *DINO),
    "dinov2-l":       EncoderSpec("vit_large_patch14_dinov2.lvd142m",            *DINO),
    "dinov2-g":       EncoderSpec("vit_giant_patch14_dinov2.lvd142m",            *DINO),
    "dinov2-reg-s":   EncoderSpec("vit_small_patch14_reg4_dinov2.lvd142m",       *DINO),
    "dinov2-reg-b":   EncoderSpec("vit_base_patch14_reg4_dinov2.lvd142m",        *DINO),
    "dinov2-reg-l":   EncoderSpec("vit_large_patch14_reg4_dinov2.lvd142m",       *DINO),
    "dinov2-reg-g":   EncoderSpec("vit_giant_patch14_reg4_dinov2.lvd142m",       *DINO),
    "dinov1-s":       EncoderSpec("vit_small_patch16_224.dino",                  *DINO),
    "dinov1-b":       EncoderSpec("vit_base_patch16_224.dino",                   *DINO),
    "dinov3-s":       EncoderSpec("vit_small_patch16_dinov3.lvd1689m",           *DINOV3),
    "dinov3-b":       EncoderSpec("vit_base_patch16_dinov3.lvd1689m",            *DINOV3),
    "dinov3-l":       EncoderSpec("vit_large_patch16_dinov3.lvd1689m",           *DINOV3),
    "dinov3-h":       EncoderSpec("vit_huge_plus_patch16_dinov3.lvd1689m",       *DINOV3),
    "mae-b":          EncoderSpec("vit_base_patch16_224.mae",                    *MAE),
    "mae-l":          EncoderSpec("vit_large_patch16_224.mae",                   *MAE),
    "mae-h":          EncoderSpec("vit_huge_patch14_224.mae",                    *MAE),
    "clip-l":         EncoderSpec("vit_large_patch14_clip_quickgelu_224.openai", *CLIP),
    "ijepa-h":        EncoderSpec("vit_huge_patch14_gap_224.in1k_ijepa",         *IJEPA),
    "ijepa-h-22k":    EncoderSpec("vit_huge_patch14_gap_224.in22k_ijepa",        *IJEPA),
    "siglip2-b":      EncoderSpec("vit_base_patch16_siglip_256.v2_webli",        *SIGLIP2),
    "siglip2-l":      EncoderSpec("vit_large_patch16_siglip_256.v2_webli",       *SIGLIP2),
    "siglip2-so400m": EncoderSpec("vit_so400m_patch16_siglip_256.v2_webli",      *SIGLIP2),
    "pe-core-b":      EncoderSpec("vit_pe_core_base_patch16_224.fb",             *PE),
    "pe-core-l":      EncoderSpec("vit_pe_core_large_patch14_336.fb",            *PE),
    "pe-spatial-b":   EncoderSpec("vit_pe_spatial_base_patch16_512.fb",          *PE),
    "pe-spatial-l":   EncoderSpec("vit_pe_spatial_large_patch14_448.fb",         *PE),
    "mocov3-s":       EncoderSpec("vit_small_patch16_224", *MOCO, {"num_heads": 12}),
    "mocov3-b":       EncoderSpec("vit_base_patch16_224",                        *MOCO),
    "mocov3-l":       EncoderSpec("vit_large_patch16_224",                       *MOCO),
}
# fmt: on


class Encoder(nn.Module):
    """A frozen network: always in eval mode, no parameter trains, `forward` under no_grad.
    Attributes: `name`, `grid`, `side` (input size in pixels), `embed_dim`."""

    def __init__(self, name: str, net: nn.Module, spec: EncoderSpec, grid: int):
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

    def train(self, mode: bool = True) -> "Encoder":
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] => (N, T, D) patch tokens, the prefix tokens left out."""
        x = ((x.float() + 1) / 2 - self.mean) / self.std
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
    if weights == "random":
        return Encoder(name, _create(spec, grid), spec, grid)
    path = _existing(weights, name) if weights else Path(_published_file(name, spec))
    overlay = {"state_dict": _read_backbone(path, spec), "num_classes": 0, "label_offset": 0}
    try:
        # standard output is closed to timm: its DINOv3 reader prints a line per missing bias
        with redirect_stdout(None):
            net = _create(spec, grid, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path} does not fit {name}: {_short(error)}") from error
    del net.pretrained_cfg["state_dict"]  # a second copy of the weights
    return Encoder(name, net, spec, grid)


def wanted_encoder(name: str, weights: str | Path | None = None) -> Wanted | None:
    """What `load_encoder` will read, without reading it; None if the weights are random."""
    if weights == "random":
        return None
    if weights is not None:
        return Wanted(str(weights), _existing(weights, name))
    return _published(name, _spec(name))


def encoder_shape(name: str, resolution: int = 256, grid: int | None = None) -> tuple[int, int]:
    """(grid, D) of `load_encoder` with the same arguments, without weights."""
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
        raise UserError(f"{name} cannot make {grid} x {grid} tokens: {_short(error)}") from error
    if not fits:
        raise UserError(
            f"{name} gives {tuple(feats.shape[1:])}, not the {grid * grid} patch tokens of a "
            f"{grid} x {grid} grid: take a ViT, or a CNN with an (N, C, h, w) feature map"
        )
    return grid, encoder.embed_dim


def _spec(name: str) -> EncoderSpec:
    if name in ENCODERS:
        return ENCODERS[name]
    known, prefix = list(ENCODERS), ""
    if name.startswith("timm:"):
        known, prefix = timm.list_models() + timm.list_pretrained(), "timm:"
        timm_name, _, stride = name.removeprefix("timm:").partition("/")
        if timm_name in known and (stride.isdecimal() or not stride):
            cfg, stride = timm.get_pretrained_cfg(timm_name), int(stride) if stride else None
            return EncoderSpec(timm_name, True, tuple(cfg.mean), tuple(cfg.std), stride=stride)
    near = get_close_matches(name.removeprefix(prefix), known, n=1, cutoff=0)[0]
    raise UserError(
        f"unknown encoder {name}: nearest is {prefix}{near}; any timm network is timm:NAME"
    )


def _has_tokens(net: nn.Module) -> bool:
    return hasattr(net, "num_prefix_tokens")


def _stage(net: nn.Module, spec: EncoderSpec) -> int:
    """Index into feature_info of the stage whose output is used."""
    strides = [info["reduction"] for info in net.feature_info]
    if spec.stride is None:
        return len(strides) - 1
    if spec.stride not in strides:
        raise UserError(f"{spec.timm_name} has no stage of stride {spec.stride}: it has {strides}")
    return len(strides) - 1 - strides[::-1].index(spec.stride)


def _create(spec: EncoderSpec, grid: int, **kwargs) -> nn.Module:
    with torch.device("meta"):
        probe = timm.create_model(spec.timm_name, num_classes=0, **spec.kwargs)
    side = grid * probe.feature_info[_stage(probe, spec)]["reduction"]
    size = {"img_size": side} if _has_tokens(probe) else {}
    return timm.create_model(spec.timm_name, num_classes=0, **size, **spec.kwargs, **kwargs)


def _existing(weights: str | Path, name: str) -> Path:
    if not Path(weights).is_file():
        raise UserError(f"encoder.weights={weights}: no such file; expected weights of {name}")
    return Path(weights)


def _published(name: str, spec: EncoderSpec) -> Wanted:
    """The published weights and their copy in the cache, if there is one."""
    cfg = timm.get_pretrained_cfg(spec.timm_name)
    if spec.url or not (cfg.hf_hub_id or cfg.url):
        raise UserError(
            f"timm publishes no weights of {name}: get them at {spec.url or 'their authors'}, then "
            "set encoder.weights=FILE"
        )
    remedy = "run {} where there is a network, then set encoder.weights=FILE"
    if cfg.hf_hub_id:
        repo, file = cfg.hf_hub_id, _hub_file(cfg)
        remedy = remedy.format(f"`hf download {repo} {file} --local-dir DIR`")
        copy = cached_file(repo, file)
        return Wanted(f"{repo}/{file}", copy, hf_hub_url(repo, file), remedy)
    path = torch_hub_file(cfg.url)
    copy = path if path.is_file() else None
    return Wanted(cfg.url, copy, cfg.url, remedy.format(f"`curl -O {cfg.url}`"))


def _hub_file(cfg) -> str:
    return cfg.hf_hub_filename or "model.safetensors"


def _published_file(name: str, spec: EncoderSpec) -> str:
    """Path of the published weights, downloaded if the cache lacks them."""
    wanted, cfg = _published(name, spec), timm.get_pretrained_cfg(spec.timm_name)
    cache = HF_HUB_CACHE if cfg.hf_hub_id else torch_hub_file(cfg.url).parent
    try:
        if cfg.hf_hub_id:
            return hf_hub_download(cfg.hf_hub_id, _hub_file(cfg))
        return _download(cfg.url)
    except (EntryNotFoundError, OSError) as error:
        raise UserError(
            f"weights of {name} not found: neither {wanted.what} on the network nor a copy in "
            f"{cache} ({type(error).__name__}); {wanted.remedy}"
        ) from error


def _download(url: str) -> str:
    path = torch_hub_file(url)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))  # writes elsewhere first, then renames
    return str(path)


def _read_backbone(path: Path, spec: EncoderSpec) -> Mapping[str, Tensor]:
    """State dict of a local file without its classifier head."""
    try:
        state = spec.key_filter(load_state_dict(str(path)))
    except (UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        raise UserError(f"{path} is not a file of plain tensors: {_short(error)}") from error
    classifier = timm.get_pretrained_cfg(spec.timm_name).classifier or ()
    layers = (classifier,) if isinstance(classifier, str) else classifier
    # `proj`, `visual.proj`: where CLIP and PE project into the space shared with text
    head = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    return {k: v for k, v in state.items() if k not in head | {"proj", "visual.proj"}}


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{' ...' if len(text) > 400 else ''}"
