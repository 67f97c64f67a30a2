"""Terms of the VAE's own objective L_REG, each unweighted, each a float32 scalar.

Images are (N, 3, H, W) in [-1, 1]. Hinge GAN as in taming transformers (arXiv 2012.09841), LPIPS of
arXiv 1801.03924 from its own package, LeCam regularisation of arXiv 2104.03310.
"""

import warnings
from pathlib import Path

import lpips
import torch
import torch.nn as nn
import torch.nn.functional as F

from models.errors import UserError
from models.vae_keys import read_state, require_match
from models.wanted import Wanted, torch_hub_file

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG_REMEDY = f"fetch {VGG_URL} and set loss.reg.lpips_weights=FILE, or set loss.reg.lpips=0"


def pixel_loss(x_hat: torch.Tensor, x: torch.Tensor, kind: str = "l1") -> torch.Tensor:
    """Mean over pixels: "l1" is what the published models saw, "mse" the paper's text."""
    assert kind in ("l1", "mse"), kind
    return (F.l1_loss if kind == "l1" else F.mse_loss)(x_hat.float(), x.float())


def kl_loss(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp logvar) || N(0, I)) of (N, C, h, w) moments: sum over each latent, mean."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1).mean()


def generator_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """The VAE's side of the hinge GAN: raise the logits of reconstructions."""
    return -logits_fake.float().mean()


def hinge_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's side: real above 1, reconstructions below -1."""
    real, fake = logits_real.float(), logits_fake.float()
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class LeCam(nn.Module):
    """LeCam regularisation (arXiv 2104.03310, Eq. 5, one-sided as in its authors' code): keep the
    logits near moving averages of the other side's. The two averages are buffers: checkpointed."""

    def __init__(self, decay: float = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
        """Logits of any shape => scalar."""
        above = F.relu(logits_real.float() - self.fake).square().mean()
        below = F.relu(self.real - logits_fake.float()).square().mean()
        return above + below

    def update(self, mean_real: torch.Tensor, mean_fake: torch.Tensor) -> None:
        """Move the averages, once a step, by the mean logits of the whole batch."""
        self.real.lerp_(mean_real, 1 - self.decay)
        self.fake.lerp_(mean_fake, 1 - self.decay)


def load_lpips(weights: str | None = None, download: bool = True) -> lpips.LPIPS:
    """LPIPS with VGG-16, frozen: `net(x, y)` takes (N, 3, H, W) in [-1, 1] and gives (N, 1, 1, 1).

    `weights`: a torchvision vgg16 state dict; None = torch's hub cache, downloaded if absent. The
    linear heads (version 0.1) come with the package. Raises `UserError` if there is none.
    """
    path = _vgg_file(weights, download)
    state = {k: v for k, v in read_state(path).items() if k.startswith("features.")}
    with warnings.catch_warnings():  # it calls torchvision by arguments that are deprecated
        warnings.simplefilter("ignore", UserWarning)
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    vgg = {f"features.{name.split('.', 1)[1]}": p.data for name, p in net.net.named_parameters()}
    require_match(vgg, state, path, "torchvision's VGG-16")
    for name, value in vgg.items():
        value.copy_(state[name])
    return net.eval().requires_grad_(False)


def wanted_vgg(weights: str | None = None) -> Wanted:
    """The VGG-16 file that `load_lpips` will read, without reading it."""
    path = _vgg_file(weights, download=False) if weights else torch_hub_file(VGG_URL)
    return Wanted("VGG-16 for LPIPS", path if path.is_file() else None, VGG_URL, VGG_REMEDY)


def _vgg_file(weights: str | None, download: bool) -> Path:
    path = Path(weights) if weights else torch_hub_file(VGG_URL)
    if path.is_file():
        return path
    if weights or not download:
        raise UserError(f"LPIPS needs VGG-16 weights, not found at {path}: {VGG_REMEDY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(VGG_URL, str(path), hash_prefix="397923af")
    except (OSError, RuntimeError) as error:  # RuntimeError: what came has another hash
        raise UserError(
            f"LPIPS needs VGG-16 weights, not found at {path} ({error}): {VGG_REMEDY}"
        ) from None
    return path


def perceptual_loss(
    net: lpips.LPIPS, x_hat: torch.Tensor, x: torch.Tensor, double_scaling: bool = False
) -> torch.Tensor:
    """Mean LPIPS over images. `double_scaling` maps the images from [-1, 1] to [-3, 1], as the
    published runs did by mistake; only for reproducing them."""
    return net(x_hat.float(), x.float(), normalize=double_scaling).mean()
