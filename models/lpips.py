"""LPIPS (arXiv 1801.03924) with VGG-16, from the `lpips` package: the network and its weight file;
and the same distance with the features of any other network, for images that VGG-16 does not know.

The linear heads (version 0.1) come with the package, the weights of VGG-16 from torchvision.
"""

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checks.errors import UserError, short
from models.encoders import Encoder, encoder_weight_file, largest_grid, load_encoder
from models.layers.autocast import at_least_float32
from models.weights.loading import require_finite, require_match
from models.weights.published import WeightFile
from models.weights.reading import read_state

if TYPE_CHECKING:  # takes seconds to import
    from lpips import LPIPS

VGG = WeightFile(
    "vgg16-397923af.pth",
    url="https://download.pytorch.org/models/vgg16-397923af.pth",
    sha256="397923af",
    setting="loss.reg.lpips_weights={}",
    otherwise="set loss.reg.lpips=0",
)


def load_lpips(weights: str | None = None, download: bool = True) -> "LPIPS":
    """LPIPS, frozen: `net(x, y)` takes (N, 3, H, W) in [-1, 1] and gives (N, 1, 1, 1).

    `weights`: a torchvision vgg16 state dict; None = torch's hub cache, downloaded if absent and
    `download`; "random" (benchmarks). Raises `UserError` if there is none, or if it is of another
    network.
    """
    if weights == "random":
        return build_lpips()
    path = vgg_weight_file(weights).fetch(download)
    what = "torchvision's VGG-16"
    state = read_state(path, known=("features.0.weight",), what=what)
    state = {name: value for name, value in state.items() if name.startswith("features.")}
    net = build_lpips()
    vgg = {f"features.{name.split('.', 1)[1]}": p.data for name, p in net.net.named_parameters()}
    require_match(vgg, state, path, what)
    require_finite(state, path)
    for name, value in vgg.items():
        value.copy_(state[name])
    return net


def build_lpips() -> "LPIPS":
    """The network of `load_lpips` with a random VGG-16; reads no file but the package's own."""
    from lpips import LPIPS

    with warnings.catch_warnings():  # it calls torchvision by arguments that are deprecated
        warnings.simplefilter("ignore", UserWarning)
        net = LPIPS(net="vgg", pnet_rand=True, verbose=False)
    return net.eval().requires_grad_(False)


# Of the gradients inside a half VGG, for one image of 64 x 64 pixels: with it, they have the noise
# of TF32; without it, most are too small for float16. A power of two, so that it rounds nothing.
LOSS_SCALE = 2.0**16


class HalfVGG(nn.Module):
    """The VGG of LPIPS in float16; takes and gives float32.

    It scales its own gradients, for a gradient of the mean over images that is not scaled yet
    (`loss.reconstruction.perceptual_loss` sees to that). bfloat16 would be three times as noisy.
    """

    def __init__(self, vgg: nn.Module):
        super().__init__()
        self.vgg = vgg.half()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W) => the features of five layers."""
        # means over more images or pixels have smaller gradients
        scale = LOSS_SCALE * 2.0 ** round(math.log2(x.numel() / (3 * 64 * 64)))
        feats = self.vgg(_ScaleGradient.apply(x, 1 / scale).half())
        return [_ScaleGradient.apply(f.float(), scale) for f in feats]


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # pyright: ignore
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.factor, None


def halve(net: "LPIPS") -> None:
    """Let LPIPS run its VGG in float16 from now on."""
    setattr(net, "net", HalfVGG(net.net))  # noqa: B010


def vgg_weight_file(weights: str | None = None) -> WeightFile:
    """The VGG-16 file that `load_lpips` will read, without reading it."""
    return VGG.named(weights) if weights else VGG


class PerceptualNet(nn.Module):
    """The distance of two images in the features of a frozen network: LPIPS (arXiv 1801.03924,
    Eq. 1) with all weights 1, and the mean over the network's stages instead of their sum.

    encoder: holds the network, its mean and std. side: pixels at which images are fed; they are
    resized to it. The network is always in eval mode, no parameter of it trains.
    """

    def __init__(self, encoder: Encoder, side: int):
        super().__init__()
        self.encoder, self.side = encoder, side

    def forward(self, x: Tensor, y: Tensor, normalize: bool = False) -> Tensor:
        """Two batches (N, 3, H, W) in [-1, 1] => (N, 1, 1, 1), each between 0 and 4. `normalize`:
        as that of `lpips.LPIPS`, for images in [0, 1]."""
        pairs = zip(self._stages(x, normalize), self._stages(y, normalize))
        stages = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]
        return torch.stack(stages).mean(dim=0).view(-1, 1, 1, 1)

    def _stages(self, x: Tensor, normalize: bool) -> list[Tensor]:
        """Features (N, D, h, w) of each stage, of norm 1 at each position."""
        x = at_least_float32(x)
        x = x if normalize else (x + 1) / 2
        x = (x - self.encoder.mean) / self.encoder.std
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=False)
        feats = self.encoder.net.forward_intermediates(x, intermediates_only=True)
        return [F.normalize(f, dim=1, eps=1e-6) for f in feats]


def load_perceptual_net(spec: str, resolution: int, side: int | None = None) -> PerceptualNet:
    """The network of a perceptual loss for images of `resolution` pixels.

    spec: NAME[@FILE], NAME as in `models.encoders.load_encoder` (timm:resnet18, dinov2-s), FILE its
    weights, "random" for none, the published ones without it. side: pixels at which the network is
    fed, None = `resolution`; of a transformer, the next lower multiple of its patch. `UserError`
    for a network without stages, and as `load_encoder` does.
    """
    name, file = split_perceptual(spec)
    if weights := perceptual_weight_file(spec):
        weights.find()  # a file that is not there is named by its own setting
    grid = largest_grid(name, side or resolution)
    encoder = load_encoder(name, file, resolution, grid)
    net = PerceptualNet(encoder, encoder.side if encoder.has_tokens else side or resolution)
    try:
        with torch.no_grad():
            x = torch.zeros(1, 3, resolution, resolution, device=encoder.mean.device)
            net(x, x)
    except (AttributeError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        why = short(error, 100)
        raise UserError(f"{name} cannot be the network of a perceptual loss: {why}") from None
    return net


def perceptual_weight_file(spec: str) -> WeightFile | None:
    """The file that `load_perceptual_net` will read, without reading it; None if none."""
    file = encoder_weight_file(*split_perceptual(spec))
    setting = f"loss.reg.perceptual_net={spec.partition('@')[0]}@{{}}"
    return file and replace(file, setting=setting, otherwise="set loss.reg.perceptual=0")


def split_perceptual(spec: str) -> tuple[str, str | None]:
    """NAME[@FILE] => (NAME, FILE or None)."""
    name, _, file = spec.partition("@")
    return name, file or None
