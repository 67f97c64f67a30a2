"""Frozen feature networks for Frechet distances: uint8 images in, float32 features out.

- `inception`: the TensorFlow Inception of 2015-12-05 with TF1 resize, as torch-fidelity ports it,
  and the ADM suite's sFID features (ReLU output of the 1x1 branch of Mixed_6d, first 7 channels)
  taken in the same pass by a hook.
- `dinov2`: ViT-L/14 from timm with the position embedding resampled as Meta's hub code does.
- `timm:NAME[@CKPT]`: any timm network; `pixel`: the image averaged to 12x12. Neither is comparable
  to papers.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from models.errors import UserError
from utils.weight_files import PUBLISHED, find_weights, sha256_file

SYNTAX = "inception, dinov2, timm:NAME[@CKPT] or pixel"


@dataclass
class FeatureNet:
    """A loaded network. `forward`: uint8 (N, 3, H, W) on `device` => {"pool": (N, D) float32, ...}.

    `label` names the network in every number; `published` is True only for the checked published
    weights of inception and dinov2; `facts` says all that the features depend on (JSON-able).
    """

    family: str
    label: str
    published: bool
    facts: dict
    device: torch.device
    forward: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    fc_weight: torch.Tensor | None = None  # (1008, 2048), inception only

    @torch.no_grad()
    def __call__(self, x_u8: torch.Tensor) -> dict[str, torch.Tensor]:
        assert x_u8.dtype == torch.uint8 and x_u8.shape[1] == 3, (x_u8.dtype, x_u8.shape)
        with exact_float32(), torch.autocast(self.device.type, enabled=False):
            return self.forward(x_u8.to(self.device))


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 inside: PyTorch lets cuDNN use it by default, and training may for matmuls too."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def parse_features(spec: str) -> tuple[str, str, str | None]:
    """`timm:NAME@CKPT` => ("timm", NAME, CKPT); others => (spec, "", None). Else `UserError`."""
    family, _, rest = spec.partition(":")
    name, _, checkpoint = rest.partition("@")
    if (family == "timm") != bool(name) or family not in (*PUBLISHED, "timm", "pixel"):
        raise UserError(f"--features {spec!r}: expected {SYNTAX}")
    if family == "timm" and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(f"--features {spec!r}: timm has no {name!r}; nearest: {', '.join(near)}")
    return family, name, checkpoint or None


def load_features(
    spec: str,
    *,
    weights: str | None = None,
    weights_sha256: str | None = None,
    download: bool = False,
    device: torch.device | str = "cpu",
) -> FeatureNet:
    """Load the network named by `spec` (see `SYNTAX`); `weights*` are for inception and dinov2."""
    family, name, checkpoint = parse_features(spec)
    device = torch.device(device)
    if family in PUBLISHED:
        path, sha256 = find_weights(family, weights, weights_sha256, download)
        return {"inception": _inception, "dinov2": _dinov2}[family](path, sha256, device)
    if weights or weights_sha256:
        raise UserError(f"--weights is for inception and dinov2; {spec!r} takes timm:NAME@FILE")
    if family == "timm":
        return _timm(name, checkpoint, download, device)
    facts = {"network": "none", "resize": "area to 12x12", "range": "[0, 1]"}
    return FeatureNet("pixel", "pixel12", False, facts, device, _pixels)


def require_weights(spec: str, weights: str | None = None) -> None:
    """`UserError` unless `load_features` would find its weights on this machine; loads nothing."""
    family, name, checkpoint = parse_features(spec)
    if family in PUBLISHED:
        find_weights(family, weights)
    elif family == "timm":
        _timm_file(name, checkpoint, download=False)


def _pixels(x_u8: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pool": F.adaptive_avg_pool2d(x_u8.float() / 255, 12).flatten(1)}


class ADMInception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception that also keeps what the ADM suite calls mixed_6/conv."""

    def __init__(self, path: str | Path):
        super().__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
        self.spatial = None
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output) -> None:
        self.spatial = output

    def features(self, x_u8: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) uint8 => pool (N, 2048), spatial (N, 17 * 17 * 7 = 2023), NHWC order."""
        (pool,) = self(x_u8)
        spatial, self.spatial = self.spatial[:, :7].permute(0, 2, 3, 1).flatten(1), None
        return {"pool": pool, "spatial": spatial.float()}


def _inception(path: Path, sha256: str, device: torch.device) -> FeatureNet:
    net = ADMInception(path).to(device)
    published = sha256 == PUBLISHED["inception"].sha256
    label = "inception" if published else f"inception#{sha256[:8]}"
    facts = {
        "network": "inception-2015-12-05 (torch-fidelity)",
        "weights_sha256": sha256,
        "resize": "tf1_bilinear to 299",
        "range": "(x - 128) / 128",
        "tf32": False,
    }
    return FeatureNet("inception", label, published, facts, device, net.features, net.fc.weight)


def hub_pos_embed(pos: torch.Tensor, grid: int) -> torch.Tensor:
    """DINOv2's position embedding (1, 1 + 37 * 37, D) on a grid x grid map, as Meta's hub code
    does: bicubic without antialias, scale (grid + 0.1) / 37. timm antialiases: features 5 % off."""
    side = round((pos.shape[1] - 1) ** 0.5)
    tokens = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    tokens = F.interpolate(tokens.float(), scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([pos[:, :1], tokens.flatten(2).transpose(1, 2)], 1)


def _dinov2(
    path: Path, sha256: str, device: torch.device, name: str = "vit_large_patch14_dinov2"
) -> FeatureNet:
    net = timm.create_model(name, pretrained=False, img_size=224, num_classes=0)
    state = torch.load(path, map_location="cpu", weights_only=True)
    state.pop("mask_token", None)  # used in pre-training only
    state["pos_embed"] = hub_pos_embed(state["pos_embed"], 224 // 14)
    _load_strictly(net, state, path)
    published = sha256 == PUBLISHED["dinov2"].sha256
    facts = {"network": f"{name} (timm), hub-style pos_embed", "weights_sha256": sha256,
             "resize": "PIL bicubic to 224, uint8", "range": "ImageNet mean and std",
             "feature": "class token after the final norm", "tf32": False}  # fmt: skip
    net = net.to(device).eval().requires_grad_(False)
    label = "dinov2" if published else f"dinov2#{sha256[:8]}"
    forward = partial(_normalised_forward, net, *_statistics(net), _pil_resize)
    return FeatureNet("dinov2", label, published, facts, device, forward)


def _timm(name: str, checkpoint: str | None, download: bool, device: torch.device) -> FeatureNet:
    net = timm.create_model(name, pretrained=False, num_classes=0)
    path = _timm_file(name, checkpoint, download)
    state = load_file(path) if path.suffix == ".safetensors" else _torch_state(path)
    _load_strictly(net, _without_head(net, state), path)
    sha256 = sha256_file(path)
    size = _input_size(net, path)
    mean, std = _statistics(net)
    facts = {"network": f"{name} (timm {timm.__version__})", "weights_sha256": sha256,
             "resize": f"bicubic to {size}, antialiased if smaller" if size else "none",
             "mean": mean.flatten().tolist(), "std": std.flatten().tolist(),
             "feature": "pooled, before the classifier", "tf32": False}  # fmt: skip
    label = f"timm:{name}{'@' + path.name if checkpoint else ''}#{sha256[:8]}"
    net = net.to(device).eval().requires_grad_(False)
    forward = partial(_normalised_forward, net, mean, std, partial(_tensor_resize, size))
    return FeatureNet("timm", label, False, facts, device, forward)


def _timm_file(name: str, checkpoint: str | None, download: bool) -> Path:
    path = Path(checkpoint) if checkpoint else _hub_checkpoint(name, download)
    if not path.is_file():
        raise UserError(f"--features timm:{name}@{checkpoint}: no such file {path}")
    return path


def _hub_checkpoint(name: str, download: bool) -> Path:
    cfg = timm.get_pretrained_cfg(name)
    repo = cfg.hf_hub_id if cfg else None
    if not repo:
        raise UserError(f"timm:{name} has no published weights: give timm:{name}@CKPT")
    cached = huggingface_hub.try_to_load_from_cache(repo, "model.safetensors")
    if isinstance(cached, str):
        return Path(cached)
    remedy = f"give a local file as timm:{name}@CKPT"
    if not download:
        raise UserError(
            f"weights of {repo} are not in the Hugging Face cache: {remedy}, or add --download"
        )
    try:
        return Path(huggingface_hub.hf_hub_download(repo, "model.safetensors"))
    except OSError as error:
        raise UserError(f"cannot download {repo} ({error}): {remedy}") from None


def _torch_state(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    return next((state[key] for key in ("state_dict", "model") if key in state), state)


def _without_head(net, state: dict) -> dict:
    classifier = net.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {k: v for k, v in state.items() if k.rpartition(".")[0] not in heads}


def _load_strictly(net, state: dict, path: Path) -> None:
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {type(net).__name__}: {str(error)[:500]}") from None


def _statistics(net) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(net.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))


def _normalised_forward(net, mean, std, resize, x_u8: torch.Tensor) -> dict[str, torch.Tensor]:
    x = resize(x_u8).float() / 255
    return {"pool": net((x - mean.to(x)) / std.to(x)).float()}


def _input_size(net, path: Path) -> tuple[int, int] | None:
    """The size a network must or wants to be fed at; None: the images' own.

    scripts/train_classifier.py states it in the file; transformers of fixed size have it in timm.
    """
    stated = "null"
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get("classifier", "null")
    facts = json.loads(stated)
    if facts is not None:
        return (facts["size"], facts["size"])
    fixed = net.pretrained_cfg.get("fixed_input_size")
    return tuple(net.pretrained_cfg["input_size"][1:]) if fixed else None


def _tensor_resize(size: tuple[int, int] | None, x_u8: torch.Tensor) -> torch.Tensor:
    if size is None or x_u8.shape[2:] == size:
        return x_u8
    smaller = size[0] < x_u8.shape[2] or size[1] < x_u8.shape[3]
    return F.interpolate(x_u8.float(), size=size, mode="bicubic", antialias=smaller)


def _pil_resize(x_u8: torch.Tensor, size: int = 224) -> torch.Tensor:
    """dgm-eval's resize: PIL bicubic straight to 224x224, rounded to uint8."""
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda a: np.array(Image.fromarray(a).resize((size, size), 3)),
                          x_u8.permute(0, 2, 3, 1).cpu().numpy())  # fmt: skip
        return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).to(x_u8.device)
