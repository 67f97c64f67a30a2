"""What compares pictures with their reconstructions, and describes latents."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checks.errors import UserError

# window of SSIM (Wang et al. 2004): side in pixels, standard deviation
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def psnr(x_u8: Tensor, y_u8: Tensor) -> Tensor:
    """PSNR per image, in dB, of uint8 pictures (N, 3, H, W) => (N,) float64. The squared error of
    values in [0, 1] is floored at 1e-10, as RAE does: equal pictures have 100 dB."""
    error = (x_u8.double() - y_u8.double()) / 255
    return -10 * error.square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(x_u8: Tensor, y_u8: Tensor) -> Tensor:
    """SSIM per image of uint8 pictures (N, 3, H, W) => (N,) float64, mean over the channels. As
    defined by Wang et al. (2004): Gaussian window of 11x11 pixels, only where all of it lies inside
    the picture, covariances divided by n. Equal to scikit-image's to rounding."""
    height, width = x_u8.shape[2:]
    if min(height, width) < SSIM_WINDOW:
        least = f"{SSIM_WINDOW}x{SSIM_WINDOW}; leave ssim out of --metrics"
        raise UserError(f"{height}x{width} images: SSIM needs at least {least}")
    x, y = x_u8.double(), y_u8.double()
    rows, columns = _gaussian_filter(height, x.device), _gaussian_filter(width, x.device).T
    mean_x, mean_y, xx, yy, xy = (rows @ map_ @ columns for map_ in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = xx - mean_x.square(), yy - mean_y.square(), xy - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    score *= (2 * cov + c2) / (var_x + var_y + c2)
    return score.mean((1, 2, 3))


@lru_cache  # to bring it to a GPU makes the host wait
def _gaussian_filter(size: int, device: torch.device) -> Tensor:
    """(size - 10, size) float64: times a column of pixels, the window's weighted means of it."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    free = size - SSIM_WINDOW
    return torch.stack([F.pad(window, (i, free - i)) for i in range(free + 1)]).to(device)


class LatentStatistics:
    """Streaming statistics of latent maps (N, C, H, W), as float64 sums on `device`.

    spatial_variance: variance over the positions of a map; total_variation: sum of the absolute
    differences of vertical and of horizontal neighbours; both averaged over maps and channels. (The
    REPA-E paper does not define what is in its Table 10; this fits the magnitudes there.)
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        # rows: images, sum z, sum z^2 (both per position), spatial variance, total variation
        self.sums = torch.zeros(5, channels, dtype=torch.float64, device=device)

    def add(self, z: Tensor) -> None:
        """Add a batch (n, C, H, W) of un-normalised latents."""
        if not len(z):
            return
        z = z.to(self.sums)
        across, down = (z.diff(dim=d).abs().sum((2, 3)) for d in (2, 3))
        variance = z.var((2, 3), correction=0)
        parts = (z.mean((2, 3)), z.square().mean((2, 3)), variance, across + down)
        self.sums[0] += len(z)
        for row, part in zip(self.sums[1:], parts):
            row += part.sum(0)

    def result(self) -> dict[str, float | list[float]]:
        """Per-channel mean and std, and the two scalars of paper Table 10."""
        mean, square, variance, variation = self.sums[1:] / self.sums[0]
        return {
            "latent_mean": mean.tolist(),
            "latent_std": (square - mean.square()).clamp(min=0).sqrt().tolist(),
            "spatial_variance": variance.mean().item(),
            "total_variation": variation.mean().item(),
        }
