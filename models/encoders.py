"""Frozen vision encoders whose patch features the SiT is aligned with. All networks are timm's.

A new encoder is a row of `models/backbones/table.py`; one that timm has can also be used without a
row, as timm:NAME. What timm does not have cannot be used.

`x` image in [-1, 1], (N, 3, H, W); features (N, T, D), T = grid * grid patch tokens, row by row.
The input size follows from the grid (patch 14 and a 16 x 16 grid: 224 px), so that tokens match
those of the SiT.
"""

import re
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.files import NAMES, weights_in
from models.backbones.loading import create_network, load_network, network_on_meta
from models.backbones.names import PUBLISHED, canonical, unknown_encoder
from models.backbones.table import ENCODERS, EncoderSpec
from models.checks.errors import UserError, short
from models.layers.autocast import at_least_float32
from models.weights.configs import CONFIG
from models.weights.published import WeightFile

# timm, which takes seconds to import, is imported in the functions that use it


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

    name: key of `ENCODERS`, a published name of one (`models/backbones/names.py`), or timm:NAME for
    any timm network: a ViT (patch tokens after the final norm) or a CNN (last feature map, or with
    timm:NAME/STRIDE that of the stage with STRIDE input pixels per cell); mean and std are then
    timm's for that network.
    weights: None = the published ones (timm's hub cache, or a download), a local file or folder in
    the format of timm, of the authors or of transformers (a classifier head and what else stands
    beside the encoder is left out, all else must fit exactly), or "random" (tests and benchmarks).
    grid: tokens per side, None = resolution // 16.
    """
    shape = encoder_on_meta(name, resolution, grid)
    name, spec, side = shape.name, _spec(name), shape.side if shape.has_tokens else None
    file = encoder_weight_file(name, weights)
    if file is None:
        net = create_network(spec, side)
    else:
        net = load_network(spec, file.fetch(), shape.net, name, side)
    return Encoder(name, net, spec, shape.grid)


def encoder_weight_file(name: str, weights: str | Path | None = None) -> WeightFile | None:
    """The file that `load_encoder` will read, without reading it; None if the weights are random.
    Raises `UserError` if `weights` names none and timm publishes none."""
    if weights == "random":
        return None
    if weights is not None:
        path = weights_in(Path(weights))
        return WeightFile(f"weights of {name}", path=path, setting="encoder.weights={}")

    spec = _spec(name)
    cfg = _published_config(spec.timm_name)
    if spec.url or not (cfg.hf_hub_id or cfg.url):
        raise UserError(
            f"timm publishes no weights of {name}: get them at {spec.url or 'their authors'}, then "
            "set encoder.weights=FILE"
        )
    if cfg.hf_hub_id:
        file = cfg.hf_hub_filename or "model.safetensors"
        of_timm = WeightFile(file, repo=cfg.hf_hub_id, setting="encoder.weights={}")
    else:
        of_timm = WeightFile(Path(cfg.url).name, url=cfg.url, setting="encoder.weights={}")
    repo = spec.model_types and PUBLISHED[canonical(name)][0]
    if repo and "/" in repo and not of_timm.find():
        # the same weights in the layout of transformers, which many have in their cache
        own = replace(of_timm, name=NAMES[0], repo=repo, url="", companions=(CONFIG,))
        return own if own.find() else of_timm
    return of_timm


def encoder_shape(name: str, resolution: int = 256, grid: int | None = None) -> tuple[int, int]:
    """(grid, D) of `encoder_on_meta`."""
    encoder = encoder_on_meta(name, resolution, grid)
    return encoder.grid, encoder.embed_dim


def encoder_on_meta(name: str, resolution: int = 256, grid: int | None = None) -> Encoder:
    """The encoder of `load_encoder` on the meta device, without memory for its weights. Raises
    `UserError` for an unknown name, and for a network that cannot give such a grid."""
    name = canonical(name)
    if grid is None and resolution % 16:
        raise UserError(f"resolution {resolution} is not a multiple of 16: set encoder.grid")
    grid = grid or resolution // 16
    spec = _spec(name)
    try:
        with torch.device("meta"):
            encoder = Encoder(name, network_on_meta(spec), spec, grid)
            if encoder.has_tokens:
                encoder = Encoder(name, network_on_meta(spec, encoder.side), spec, grid)
            feats = encoder(torch.zeros(1, 3, resolution, resolution))
        fits = feats.shape == (1, grid * grid, encoder.embed_dim)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        raise UserError(f"{name} cannot make {grid} x {grid} tokens: {short(error)}") from error
    if not fits:
        raise UserError(
            f"{name} gives {tuple(feats.shape[1:])}, not the {grid * grid} patch tokens of a "
            f"{grid} x {grid} grid: take a ViT, or a CNN with an (N, C, h, w) feature map"
        )
    return encoder


def largest_grid(name: str, side: int) -> int:
    """The most tokens per side that an image of `side` pixels gives, and 1 if it is smaller."""
    spec = _spec(name)
    with torch.device("meta"):
        encoder = Encoder(name, network_on_meta(spec), spec, 1)
    return max(1, side // encoder.side)


def _spec(name: str) -> EncoderSpec:
    short_name = canonical(name)
    if short_name in ENCODERS:
        return ENCODERS[short_name]
    if name.startswith("timm:"):
        return _timm_spec(name)
    raise unknown_encoder(name)


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
