"""LPIPS (arXiv 1801.03924) with VGG-16, from the `lpips` package: the network and its weight file.

The linear heads (version 0.1) come with the package, the weights of VGG-16 from torchvision.
"""

import warnings
from typing import TYPE_CHECKING

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
    `download`. Raises `UserError` if there is none, or if it is of another network.
    """
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


def vgg_weight_file(weights: str | None = None) -> WeightFile:
    """The VGG-16 file that `load_lpips` will read, without reading it."""
    return VGG.named(weights) if weights else VGG
