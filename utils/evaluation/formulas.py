"""The formulas of the metrics: arrays in, numbers out; no files, no networks, no processes.

Definitions follow the ADM suite (openai/guided-diffusion@22e0df8, evaluations/evaluator.py), except
that the Frechet distance takes symmetric eigenvalues in place of `sqrtm` (real and finite by
construction), that moments are float64, and that the Inception Score takes a log-softmax (no nan
where a probability is zero). Letters: N images, D feature dimension.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import UserError

# edge of ADM's blocks of distances: its test for float16 overflow is made for each such block
DISTANCE_BLOCK = 10_000
# rounding may put a Frechet distance this far below zero; further is a fault of the program
NEGATIVE_FRECHET = -1e-3
# window of SSIM (Wang et al. 2004): side in pixels, standard deviation
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


class Moments:
    """Streaming mean and covariance: n, sum x (D,), sum x x^T (D, D), all float64 on `device`."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.n = torch.zeros(1, dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, feats: Tensor) -> None:
        """Add a batch (n, D), which may be empty."""
        x = feats.to(self.total)
        self.n += len(x)
        self.total += x.sum(0)
        self.outer.addmm_(x.T, x)

    def __add__(self, other: "Moments") -> "Moments":
        merged = Moments(len(self.total), self.total.device)
        for name in ("n", "total", "outer"):
            getattr(merged, name).copy_(getattr(self, name) + getattr(other, name))
        return merged

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Replace the three tensors by their sums over ranks."""
        self.n, self.total, self.outer = map(sum_over_ranks, (self.n, self.total, self.outer))

    @property
    def count(self) -> int:
        return round(self.n.item())

    def mean(self) -> np.ndarray:
        """(D,) float64."""
        return (self.total / self.n).cpu().numpy()

    def cov(self) -> np.ndarray:
        """(D, D) float64, divided by n - 1 as np.cov does; `UserError` for fewer than 2 images."""
        if self.count < 2:
            raise UserError(f"{self.count} image(s): a covariance needs at least 2; give more")
        mean = self.total / self.n
        return ((self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)).cpu().numpy()


def factor(sigma: np.ndarray) -> np.ndarray:
    """L (D, D) with L L^T = sigma: Cholesky, or eigenvectors when sigma is only semi-definite."""
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma)
        return vectors * np.sqrt(np.clip(values, 0, None))


def centred_factor(feats: np.ndarray) -> np.ndarray:
    """(D, N) float64 whose product with its transpose is the covariance of feats (N, D)."""
    x = np.asarray(feats, np.float64)
    return (x - x.mean(0)).T / np.sqrt(len(x) - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray):
    """Frechet distance of two Gaussians; mu (D,), sigma (D, D) with any float dtype => float.
    Tr sqrt(S1 S2) = sum of the roots of the eigenvalues of L^T S2 L, S1 = L L^T: a symmetric
    problem, so never complex. Values down to -1e-3 are rounding and returned as they are."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    assert mu1.shape == mu2.shape and sigma1.shape == sigma2.shape, (mu1.shape, mu2.shape)
    _require_finite(mu1, sigma1, mu2, sigma2)
    lower = factor(sigma1)
    product = lower.T @ sigma2 @ lower
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None))
    return _assemble(mu1, np.trace(sigma1), mu2, np.trace(sigma2), roots.sum())


def frechet_from_factors(mu1: np.ndarray, a1: np.ndarray, mu2: np.ndarray, a2: np.ndarray):
    """The same distance from factors a_i (D, N_i) with S_i = a_i a_i^T. It stays exact without full
    rank (N_i < D): Tr sqrt(S1 S2) is the nuclear norm of a1^T a2, no root of a rounding error."""
    _require_finite(mu1, a1, mu2, a2)
    nuclear = np.linalg.svd(a1.T @ a2, compute_uv=False).sum()
    return _assemble(mu1, (a1**2).sum(), mu2, (a2**2).sum(), nuclear)


def _require_finite(*arrays: np.ndarray) -> None:
    if not all(np.isfinite(a).all() for a in arrays):
        raise UserError("features or statistics hold nan or inf, a Frechet distance needs finite "
                        "ones; check the weight file and the reference file")  # fmt: skip


def _assemble(mu1, trace1, mu2, trace2, root_trace) -> float:
    value = float(((mu1 - mu2) ** 2).sum() + trace1 + trace2 - 2 * root_trace)
    assert value > NEGATIVE_FRECHET * max(1.0, 1e-3 * (trace1 + trace2)), f"distance {value}"
    return value


def inception_score(pool, weight, order=None, *, split_size: int) -> tuple[float, float]:
    """Mean and std over splits of exp(KL(p(y|x) || p(y))); pool (N, D), weight (K, D), no bias.
    Splits are `split_size` consecutive images, the last one may be shorter; `order` (N,) permutes
    the images first. Softmax in float64 through logs: a zero probability contributes zero."""
    pool, weight = torch.as_tensor(pool), torch.as_tensor(weight).float()
    pool = pool if order is None else pool[torch.as_tensor(order)]
    scores = []
    for rows in pool.split(split_size):
        log_p = (rows.to(weight) @ weight.T).double().log_softmax(1)
        p = log_p.exp()
        marginal = p.mean(0)
        kl = (p * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(kl.exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real, fake, k: int, mode: str, block: int = DISTANCE_BLOCK):
    """Improved precision and recall (arXiv 1904.06991) of features (N, D), float32 => two floats.
    The manifold of a set is the union of balls around its points that reach to the k-th nearest
    neighbour. `mode` "adm_fp16" repeats the float16 distances of the ADM suite, whose ties widen
    the manifolds slightly in all published tables; "fp32" does not. Needs 12 * block^2 bytes."""
    real, fake = torch.as_tensor(real).float(), torch.as_tensor(fake).float()
    for name, feats in (("reference", real), ("samples", fake)):
        if len(feats) < k + 1:
            raise UserError(f"{len(feats)} images in the {name}: precision/recall with k = {k} "
                            f"needs at least {k + 1}; give more images")  # fmt: skip
    real_radii, fake_radii = (manifold_radii(feats, k, mode, block) for feats in (real, fake))
    real_inside = torch.zeros_like(real_radii, dtype=torch.bool)
    fake_inside = torch.zeros_like(fake_radii, dtype=torch.bool)
    for i in range(0, len(real), block):
        for j in range(0, len(fake), block):
            rows, cols = slice(i, i + block), slice(j, j + block)
            d = squared_distances(real[rows], fake[cols], mode)
            fake_inside[cols] |= (d <= real_radii[rows, None]).any(0)
            real_inside[rows] |= (d <= fake_radii[None, cols]).any(1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def manifold_radii(feats: Tensor, k: int, mode: str, block: int = DISTANCE_BLOCK) -> Tensor:
    """Squared distance of each point (N, D) to its k-th neighbour, itself not counted => (N,)."""
    radii = []
    for rows in feats.split(block):
        nearest = torch.full((len(rows), k + 1), torch.inf, device=feats.device)
        for cols in feats.split(block):
            d = squared_distances(rows, cols, mode)
            found = d.topk(min(k + 1, d.shape[1]), dim=1, largest=False).values
            nearest = torch.cat([nearest, found], 1).topk(k + 1, dim=1, largest=False).values
        radii.append(nearest[:, k])
    return torch.cat(radii)


def squared_distances(u: Tensor, v: Tensor, mode: str) -> Tensor:
    """Float32 (n, m) of u (n, D), v (m, D), in the arithmetic of `mode`. ADM casts to float16, with
    float32 for a whole block in which anything overflows."""
    assert mode in ("adm_fp16", "fp32"), mode
    if mode == "adm_fp16":
        # norms and products are rounded to float16, the sums inside each kept in float32 as on GPUs
        norm_u, norm_v = ((a.half() * a.half()).float().sum(1).half() for a in (u, v))
        d = (u.half().float() @ v.half().float().T).half()
        d.mul_(-2).add_(norm_u[:, None]).add_(norm_v).clamp_(min=0)
        if torch.isfinite(d).all():
            return d.float()
    gram = u @ v.T
    return gram.mul_(-2).add_(u.square().sum(1)[:, None]).add_(v.square().sum(1)).clamp_(min=0)


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
    rows, columns = _gaussian_filter(height).to(x), _gaussian_filter(width).T.to(x)
    mean_x, mean_y, xx, yy, xy = (rows @ map_ @ columns for map_ in (x, y, x * x, y * y, x * y))
    var_x, var_y, cov = xx - mean_x.square(), yy - mean_y.square(), xy - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    score *= (2 * cov + c2) / (var_x + var_y + c2)
    return score.mean((1, 2, 3))


def _gaussian_filter(size: int) -> Tensor:
    """(size - 10, size) float64: times a column of pixels, the window's weighted means of it."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    free = size - SSIM_WINDOW
    return torch.stack([F.pad(window, (i, free - i)) for i in range(free + 1)])


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
