"""The mathematics of evaluation: arrays in, numbers out; no files, no networks, no processes.

Definitions follow the ADM suite (openai/guided-diffusion@22e0df8, evaluations/evaluator.py). What
differs: no `sqrtm` in the Frechet distance (symmetric eigenvalues instead, real and finite by
construction), float64 moments, and log-softmax in the Inception Score (no nan at zero probability).
Letters: N images, D feature dimension.
"""

from collections.abc import Callable

import numpy as np
import torch
from skimage.metrics import structural_similarity

from models.errors import UserError

IS_SPLIT = 5000  # ADM: a split is 5,000 images in file order, not a tenth of the set
PR_NEIGHBOUR = 3  # ADM: k-th nearest neighbour, the point itself not counted
PR_BLOCK = 10_000  # ADM: block edge; its fp16 overflow test is made per block of this size
NEGATIVE_FD = -1e-3  # rounding may go this far below zero; further is a fault


class Moments:
    """Streaming mean and covariance: n, sum x (D,), sum x x^T (D, D), all float64 on `device`."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.n = torch.zeros(1, dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, feats: torch.Tensor | np.ndarray, block: int = 1024) -> "Moments":
        """Moments of features (N, D) held in memory, `block` rows at a time in float64."""
        feats = torch.as_tensor(feats)
        moments = cls(feats.shape[1], feats.device)
        for rows in feats.split(block):
            moments.add(rows)
        return moments

    def add(self, feats: torch.Tensor) -> None:
        """Add a batch (n, D); an empty batch is allowed."""
        x = feats.to(self.total)
        self.n += len(x)
        self.total += x.sum(0)
        self.outer.addmm_(x.T, x)

    def __add__(self, other: "Moments") -> "Moments":
        merged = Moments(len(self.total), self.total.device)
        for name in ("n", "total", "outer"):
            getattr(merged, name).copy_(getattr(self, name) + getattr(other, name))
        return merged

    def reduce(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the three tensors by their sums over ranks."""
        self.n, self.total, self.outer = map(sum_over_ranks, (self.n, self.total, self.outer))

    @property
    def count(self) -> int:
        return round(self.n.item())

    def mean(self) -> np.ndarray:
        """(D,) float64."""
        return (self.total / self.n).cpu().numpy()

    def cov(self) -> np.ndarray:
        """(D, D) float64 with ddof = 1, as np.cov; `n < 2` is an error."""
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
    problem, so never complex. Values down to -1e-3 are rounding and returned as they are.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    assert mu1.shape == mu2.shape and sigma1.shape == sigma2.shape, (mu1.shape, mu2.shape)
    _require_finite(mu1, sigma1, mu2, sigma2)
    lower = factor(sigma1)
    product = lower.T @ sigma2 @ lower
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None))
    return _assemble(mu1, np.trace(sigma1), mu2, np.trace(sigma2), roots.sum())


def frechet_from_factors(mu1: np.ndarray, a1: np.ndarray, mu2: np.ndarray, a2: np.ndarray):
    """The same from factors a_i (D, N_i), S_i = a_i a_i^T: exact when N_i < D (rank-deficient).

    Tr sqrt(S1 S2) is the nuclear norm of a1^T a2: no root is taken of a rounding error.
    """
    _require_finite(mu1, a1, mu2, a2)
    nuclear = np.linalg.svd(a1.T @ a2, compute_uv=False).sum()
    return _assemble(mu1, (a1**2).sum(), mu2, (a2**2).sum(), nuclear)


def _require_finite(*arrays: np.ndarray) -> None:
    if not all(np.isfinite(a).all() for a in arrays):
        raise UserError(
            "features or statistics hold nan or inf, a Frechet distance needs finite ones; check "
            "the weight file and the reference file"
        )


def _assemble(mu1, trace1, mu2, trace2, root_trace) -> float:
    value = float(((mu1 - mu2) ** 2).sum() + trace1 + trace2 - 2 * root_trace)
    assert value > NEGATIVE_FD * max(1.0, 1e-3 * (trace1 + trace2)), f"Frechet distance {value}"
    return value


def inception_score(pool, weight, order=None, split_size: int = IS_SPLIT) -> tuple[float, float]:
    """Mean and std over splits of exp(KL(p(y|x) || p(y))); pool (N, D), weight (K, D), no bias.

    Splits are `split_size` consecutive images, the last one may be shorter; `order` (N,) permutes
    the images first. Softmax in float64 through logs: a zero probability contributes zero.
    """
    pool, weight = torch.as_tensor(pool), torch.as_tensor(weight).float()
    pool = pool if order is None else pool[torch.as_tensor(order)]
    scores = [_split_score(rows.to(weight) @ weight.T) for rows in pool.split(split_size)]
    return float(np.mean(scores)), float(np.std(scores))


def _split_score(logits: torch.Tensor) -> float:
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    marginal = p.mean(0)
    kl = (p * log_p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
    return kl.exp().item()


def precision_recall(real, fake, k: int = PR_NEIGHBOUR, mode: str = "adm_fp16", block=PR_BLOCK):
    """Improved precision and recall (arXiv 1904.06991) of features (N, D), float32 => two floats.

    `adm_fp16` repeats the ADM suite's float16 distances (ties widen the manifolds slightly, which
    published tables contain); `fp32` does not. Memory: about 12 * block^2 bytes beside features.
    """
    real, fake = torch.as_tensor(real).float(), torch.as_tensor(fake).float()
    for name, feats in (("reference", real), ("samples", fake)):
        if len(feats) < k + 1:
            raise UserError(f"{len(feats)} images in the {name}: precision/recall with k = {k} "
                            f"needs at least {k + 1}; give more images")  # fmt: skip
    real_radii = manifold_radii(real, k, mode, block)
    fake_radii = manifold_radii(fake, k, mode, block)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for i in range(0, len(real), block):
        for j in range(0, len(fake), block):
            rows, cols = slice(i, i + block), slice(j, j + block)
            d = squared_distances(real[rows], fake[cols], mode)
            fake_inside[cols] |= (d <= real_radii[rows, None]).any(0)
            real_inside[rows] |= (d <= fake_radii[None, cols]).any(1)
    return fake_inside.double().mean().item(), real_inside.double().mean().item()


def manifold_radii(feats: torch.Tensor, k: int, mode: str, block: int = PR_BLOCK) -> torch.Tensor:
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


def squared_distances(u: torch.Tensor, v: torch.Tensor, mode: str) -> torch.Tensor:
    """Float32 (n, m) of u (n, D), v (m, D), in ADM's float16 arithmetic if asked.

    ADM casts to float16, with float32 for a whole block in which anything overflows.
    """
    assert mode in ("adm_fp16", "fp32"), mode
    if mode == "adm_fp16":
        d = _half_distances(u.half(), v.half())
        if torch.isfinite(d).all():
            return d.float()
    gram = u @ v.T
    return gram.mul_(-2).add_(u.square().sum(1)[:, None]).add_(v.square().sum(1)).clamp_(min=0)


def _half_distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Norms and products rounded to float16, sums inside each kept in float32 as GPUs do."""
    norm_u, norm_v = ((a * a).float().sum(1).half() for a in (u, v))
    gram = (u.float() @ v.float().T).half()
    return gram.mul_(-2).add_(norm_u[:, None]).add_(norm_v).clamp_(min=0)


def psnr(x_u8: torch.Tensor, y_u8: torch.Tensor) -> torch.Tensor:
    """Per image, dB, of uint8 pictures (N, 3, H, W) => (N,) float64; mse floored at 1e-10 (RAE)."""
    error = (x_u8.double() - y_u8.double()) / 255
    return -10 * error.square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(x_u8: np.ndarray, y_u8: np.ndarray) -> float:
    """SSIM of one pair of uint8 pictures (H, W, 3): scikit-image with the window of Wang et al.
    (2004): 11x11 Gaussian, sigma 1.5, valid part only, channels averaged."""
    if min(x_u8.shape[:2]) < 11:
        raise UserError(f"{x_u8.shape[:2]} images: SSIM's window is 11x11; leave ssim out")
    return structural_similarity(
        x_u8, y_u8, data_range=255, channel_axis=2,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip


class LatentStatistics:
    """Streaming facts about latent maps (N, C, H, W), float64 sums on `device`.

    spatial_variance: variance over the positions of one map, averaged over maps and channels.
    total_variation: sum of |vertical| and |horizontal| differences of one map, averaged likewise
    (the definition behind REPA-E's Table 10 is not printed; this one fits its magnitudes).
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        # rows: images, sum z, sum z^2 (both per position), spatial variance, total variation
        self.sums = torch.zeros(5, channels, dtype=torch.float64, device=device)

    def add(self, z: torch.Tensor) -> None:
        """Add a batch (n, C, H, W) of un-normalised latents."""
        if not len(z):
            return
        z = z.to(self.sums)
        differences = [z.diff(dim=d).abs().sum((2, 3)) for d in (2, 3)]
        variance = z.var((2, 3), correction=0)
        parts = (z.mean((2, 3)), z.square().mean((2, 3)), variance, sum(differences))
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
