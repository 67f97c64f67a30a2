"""Means and covariances, and the Frechet distance between them.

As the ADM suite (openai/guided-diffusion@22e0df8, evaluations/evaluator.py), except that the
distance takes symmetric eigenvalues in place of `sqrtm` (real and finite by construction) and that
moments are float64. D is the feature dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from models.checks.errors import UserError

# rounding may put a Frechet distance this far below zero; further is a fault of the program
NEGATIVE_FRECHET = -1e-3


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


@dataclass
class Statistics:
    """What is kept of one feature of one set of images."""

    # number of images; None = a file of statistics did not say
    n: int | None
    # (D,) and (D, D), float64
    mean: np.ndarray
    cov: np.ndarray
    # (n, D) float32 in file order; None = not kept
    rows: np.ndarray | None = None
    # Frechet distance between two random halves of the set; None = not measured
    floor: float | None = None
    # statistics of disjoint groups of the images, equally large; empty = not measured
    groups: "list[Statistics]" = field(default_factory=list)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few images for a covariance of full rank."""
        return self.n is not None and self.n - 1 < len(self.mean)

    @property
    def exact(self) -> bool:
        """Whether the rows are to be used in place of a covariance without full rank."""
        return self.rank_deficient and self.rows is not None

    def factor(self) -> np.ndarray:
        """(D, K) float64 whose product with its transpose is `cov`."""
        if self.exact and self.rows is not None:
            return centred_factor(self.rows)
        return factor(self.cov)


def frechet_between(a: Statistics, b: Statistics) -> float:
    """Frechet distance; from the rows themselves where a covariance has not full rank."""
    if a.exact or b.exact:
        return frechet_from_factors(a.mean, a.factor(), b.mean, b.factor())
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)
