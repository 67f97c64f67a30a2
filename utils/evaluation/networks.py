"""Frozen feature networks: uint8 images in, float32 features out.

inception         the TensorFlow Inception of 2015-12-05 with TF1 resize, as in torch-fidelity; in
                  the same pass the ADM suite's features for sFID
dinov2            ViT-L/14 from timm, its position embedding resampled as Meta's hub code does
timm:NAME[@CKPT]  any timm network; never comparable to papers
pixel             the image averaged to 12x12; never comparable to papers

No pickled code is run: weight files are read as plain tensors, published ones after a hash check.
timm and torch-fidelity take seconds to import and are imported by the network that needs them.
"""

import difflib
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open

from models.backbones import loading
from models.backbones.files import weights_in
from models.backbones.layouts import KNOWN, PREFER, to_timm
from models.backbones.table import EncoderSpec
from models.checks.errors import UserError, short
from models.checks.file_kinds import SAFETENSORS, what_is
from models.weights.loading import load_strictly, require_finite, require_match
from models.weights.published import WeightFile
from models.weights.reading import read_state
from utils.data.latents import weights_id
from utils.distributed import Ranks
from utils.evaluation.images.reader import Prepare, upload
from utils.evaluation.options import PUBLISHED, Options, parse_features
from utils.precision import exact_float32
from utils.records import number, parse_record


@dataclass
class FeatureNet:
    """A loaded feature network. `forward` takes uint8 (N, 3, H, W) on `device` and gives
    {"pool": (N, D) float32}; Inception also gives "spatial". The host waits for the device in
    neither, except for images on a GPU that `prepare` needs on the CPU."""

    # inception, dinov2, timm or pixel
    family: str
    # names the network in every number
    label: str
    # whether it is a network of published metrics with the published weights
    published: bool
    # all that the features depend on, JSON-able
    facts: dict
    device: torch.device
    forward: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    # (1008, 2048) weight of the classifier, inception only
    fc_weight: torch.Tensor | None = None
    # what is done to images on the CPU before `forward`; readers do it in their threads
    prepare: Prepare | None = None

    @torch.no_grad()
    def __call__(self, x_u8: torch.Tensor, prepared: bool = False) -> dict[str, torch.Tensor]:
        """Features of images (N, 3, H, W); `prepared`: they have been through `prepare`."""
        assert x_u8.dtype == torch.uint8 and x_u8.shape[1] == 3, (x_u8.dtype, x_u8.shape)
        if self.prepare and not prepared:
            images = x_u8.permute(0, 2, 3, 1).cpu().numpy()
            with ThreadPoolExecutor() as pool:
                done = [*pool.map(self.prepare, np.split(images, len(images)))]
            x_u8 = torch.from_numpy(np.concatenate(done)).permute(0, 3, 1, 2)
        with exact_float32(), torch.autocast(self.device.type, enabled=False):
            return self.forward(upload(x_u8, self.device))


def load_network(options: Options, ranks: Ranks) -> FeatureNet:
    """The feature network on this rank's device; the main process downloads before the others."""
    load = partial(
        load_features, options.features, weights=options.weights,
        weights_sha256=options.weights_sha256, download=options.download, device=ranks.device,
    )  # fmt: skip
    return ranks.main_first(load) if options.download else load()


def load_features(
    spec: str, *, weights: str | None = None, weights_sha256: str | None = None,
    download: bool = False, device: torch.device | str = "cpu",
) -> FeatureNet:  # fmt: skip
    """Load the network named by `spec`, see `options.FEATURES`; raises `UserError`. `weights`, a
    file, and `weights_sha256` are for inception and dinov2; `download` fetches missing weights."""
    (family, name, checkpoint), device = parse_features(spec), torch.device(device)
    if family in PUBLISHED:
        path, sha256 = _published_file(family, weights, weights_sha256, download)
        return {"inception": _inception, "dinov2": _dinov2}[family](path, sha256, device)
    if weights or weights_sha256:
        raise UserError(f"--weights is for inception and dinov2; {spec!r} takes timm:NAME@FILE")
    if family == "timm":
        return _timm(name, checkpoint, download, device)
    facts = {"network": "none", "resize": "area to 12x12", "range": "[0, 1]"}
    return FeatureNet("pixel", "pixel12", False, facts, device, _pixels)


def _published_file(
    family: str, path: str | None, sha256: str | None = None, download: bool = False
) -> tuple[Path, str]:
    """The checked weight file of inception or dinov2 => (path, its sha256). `path` None: that in
    torch's hub cache. `sha256`: the user's word that weights other than the published are meant."""
    published: dict[str, Any] = dict(PUBLISHED[family])
    known: dict[str, Any] = published | ({"sha256": sha256} if sha256 else {})
    file = WeightFile(
        **known, path=Path(path) if path else None,
        setting="--weights {}",
        otherwise="" if download else f"add --download (sha256 {published['sha256']})",
    )  # fmt: skip
    found = file.fetch(download)
    return found, file.check_sha256(found, "if other weights are meant, add --weights-sha256 {}")


def _pixels(x_u8: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pool": F.adaptive_avg_pool2d(x_u8.float() / 255, 12).flatten(1)}


def load_inception(path: Path) -> Any:
    """torch-fidelity's Inception with the weights of a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles the file it is given; it gets a copy that holds tensors alone
    keys = ("Conv2d_1a_3x3.conv.weight", "fc.weight")
    state = read_state(path, known=(keys,), what="Inception")
    torch.save(state, tensors := io.BytesIO())
    tensors.seek(0)
    try:
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], tensors)
    except (RuntimeError, KeyError) as error:  # from load_state_dict
        raise UserError(f"weights of {path} do not fit Inception: {short(error)}") from None
    require_match(net.state_dict(), state, path, "Inception")
    require_finite(state, path)
    return net


class ADMInception:
    """torch-fidelity's Inception as `net`, with the features that the ADM suite takes for sFID: the
    first 7 channels of its `mixed_6/conv`, the ReLU output of Mixed_6d's 1x1 branch here."""

    def __init__(self, net: Any):
        self.net: Any = net
        self.spatial: Any = None
        net.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output) -> None:
        self.spatial = output

    def features(self, x_u8: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) uint8 => pool (N, 2048), spatial (N, 17 * 17 * 7 = 2023), NHWC order."""
        (pool,) = self.net(x_u8)
        spatial, self.spatial = self.spatial[:, :7].permute(0, 2, 3, 1).flatten(1), None
        return {"pool": pool, "spatial": spatial.float()}


def _inception(path: Path, sha256: str, device: torch.device) -> FeatureNet:
    inception = ADMInception(_on(load_inception(path), device))
    facts = {"network": "inception-2015-12-05 (torch-fidelity)", "weights_sha256": sha256,
             "resize": "tf1_bilinear to 299", "range": "(x - 128) / 128",
             "tf32": False}  # fmt: skip
    forward, weight = inception.features, inception.net.fc.weight
    return FeatureNet("inception", *_label("inception", sha256), facts, device, forward, weight)


def _label(family: str, sha256: str) -> tuple[str, bool]:
    """Name of a network of published metrics, and whether its weights are the published ones."""
    published = sha256 == PUBLISHED[family]["sha256"]
    return (family if published else f"{family}#{sha256[:8]}"), published


def hub_pos_embed(pos: torch.Tensor, grid: int) -> torch.Tensor:
    """DINOv2's position embedding (1, 1 + 37 * 37, D) on a grid x grid map, as Meta's hub code
    does: bicubic without antialias, scale (grid + 0.1) / 37. timm antialiases: features 5 % off."""
    side = round((pos.shape[1] - 1) ** 0.5)
    tokens = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    tokens = F.interpolate(tokens.float(), scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([pos[:, :1], tokens.flatten(2).transpose(1, 2)], 1)


def _dinov2(path: Path, sha256: str, device: torch.device, name="vit_large_patch14_dinov2"):
    import timm

    net = timm.create_model(name, pretrained=False, img_size=224, num_classes=0)
    state = to_timm(read_state(path, known=KNOWN, prefer=PREFER, what="DINOv2"), net)
    state.pop("mask_token", None)  # used in pre-training only
    pos_embed = state.get("pos_embed")
    if pos_embed is not None and pos_embed.shape == (1, 1 + 37 * 37, net.embed_dim):
        state["pos_embed"] = hub_pos_embed(pos_embed, 224 // 14)
    load_strictly(net, state, path, "DINOv2")
    facts = {"network": f"{name} (timm), hub-style pos_embed", "weights_sha256": sha256,
             "resize": "PIL bicubic to 224, uint8", "range": "ImageNet mean and std",
             "feature": "class token after the final norm", "tf32": False}  # fmt: skip
    forward = _pooled_features(net, lambda x_u8: x_u8, device)
    label = _label("dinov2", sha256)
    return FeatureNet("dinov2", *label, facts, device, forward, prepare=_pil_resize)


def _timm(name: str, checkpoint: str | None, download: bool, device: torch.device) -> FeatureNet:
    import timm

    path = _timm_weight_file(name, checkpoint, download).fetch(download)
    spec = EncoderSpec(name, mean=(), std=())  # timm's are taken
    try:
        like = loading.network_on_meta(spec)
    except RuntimeError as error:  # a tag that the network does not have
        raise UserError(f"--features timm:{name}: {short(error)}") from None
    net = loading.load_network(spec, path, like, f"timm's {name}")
    sha256, size = weights_id(f"timm:{name}", str(path)), _input_size(net, path)
    mean, std = (torch.tensor(net.pretrained_cfg[key]).tolist() for key in ("mean", "std"))
    facts = {"network": f"{name} (timm {timm.__version__})", "weights_sha256": sha256,
             "resize": f"bicubic to {size}, antialiased if smaller" if size else "none",
             "mean": mean, "std": std, "feature": "pooled, before the classifier",
             "tf32": False}  # fmt: skip
    label = f"timm:{name}{'@' + path.name if checkpoint else ''}#{sha256[:8]}"
    forward = _pooled_features(net, partial(_tensor_resize, size), device)
    return FeatureNet("timm", label, False, facts, device, forward)


def _timm_weight_file(name: str, checkpoint: str | None, download: bool) -> WeightFile:
    """The weights of a timm network: a file of the user's, or the published ones."""
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 3, 0.8)
        hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() lists its networks"
        raise UserError(f"--features timm:{name}: timm has no {name!r}; {hint}")
    setting = f"--features timm:{name}@{{}}"
    if checkpoint:
        path = weights_in(Path(checkpoint))
        return WeightFile(f"weights of timm's {name}", path=path, setting=setting)
    published = timm.get_pretrained_cfg(name)
    if not published or not published.hf_hub_id:
        raise UserError(f"timm:{name} has no published weights: give timm:{name}@CKPT")
    return WeightFile("model.safetensors", repo=published.hf_hub_id, setting=setting,
                      otherwise="" if download else "add --download")  # fmt: skip


def _pooled_features(net, resize: Callable, device: torch.device) -> Callable:
    """The `forward` of a timm network for images that `resize` brings to its size."""
    mean, std = (torch.tensor(net.pretrained_cfg[key], device=device).view(1, 3, 1, 1)
                 for key in ("mean", "std"))  # fmt: skip
    net = _on(net, device).eval().requires_grad_(False)
    return lambda x_u8: {"pool": net((resize(x_u8).float() / 255 - mean) / std).float()}


def _on(net, device: torch.device):
    """The network on `device`; on a GPU in the layout in which images arrive there."""
    if device.type == "cuda":
        return net.to(device, memory_format=torch.channels_last)
    return net.to(device)


def _input_size(net, path: Path) -> tuple[int, int] | None:
    """The size a network must be fed at, which scripts/train_classifier.py states in the file, and
    timm for transformers of fixed size; None: the images' own."""
    facts = read_classifier_facts(path)
    if facts:
        return (facts.size, facts.size)
    fixed = net.pretrained_cfg.get("fixed_input_size")
    return tuple(net.pretrained_cfg["input_size"][1:]) if fixed else None


@dataclass
class ClassifierFacts:
    """What scripts/train_classifier.py states in the metadata of a network that it has trained."""

    # side in pixels at which it is fed
    size: int = number(at_least=1, at_most=4096)
    network: str = ""
    seed: int = 0
    # share of the test images that it classifies right
    accuracy: float = number(0.0, at_least=0, at_most=1)


def read_classifier_facts(path: Path) -> ClassifierFacts | None:
    """The facts in a weight file; None if it has none, `UserError` if they are wrong."""
    if what_is(path) != SAFETENSORS:
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("classifier", "null")
            facts = json.loads(text)
        return None if facts is None else parse_record(facts, ClassifierFacts, "classifier")
    # whatever safetensors finds wrong; ValueError: no JSON, or a record that does not fit
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata are damaged ({error})") from None


def _tensor_resize(size: tuple[int, int] | None, x_u8: torch.Tensor) -> torch.Tensor:
    if size is None or x_u8.shape[2:] == size:
        return x_u8
    smaller = size[0] < x_u8.shape[2] or size[1] < x_u8.shape[3]
    return F.interpolate(x_u8.float(), size=size, mode="bicubic", antialias=smaller)


def _pil_resize(images: np.ndarray, size: int = 224) -> np.ndarray:
    """dgm-eval's resize of images (N, H, W, 3): PIL bicubic straight to 224x224, as uint8."""
    to, rule = (size, size), Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(image).resize(to, rule)) for image in images])
