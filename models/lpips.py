"""LPIPS (arXiv 1801.03924) with VGG-16, from the `lpips` package: the network and its weight file.

The linear heads (version 0.1) come with the package, the weights of VGG-16 from torchvision.
"""

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.weights import WeightFile, read_state, require_finite, require_match

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
    state = {k: v for k, v in read_state(path).items() if k.startswith("features.")}
    net = build_lpips()
    vgg = {f"features.{name.split('.', 1)[1]}": p.data for name, p in net.net.named_parameters()}
    require_match(vgg, state, path, "torchvision's VGG-16")
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
