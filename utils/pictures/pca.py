"""Latent maps as colours: their first three principal components are red, green and blue.

The PCA pictures of REPA-E (arXiv 2504.10483, Figs. 2, 3, 6); normalisation and colour range are not
printed there and chosen here: channels are normalised as the latent norm does it, (z - mean) /
sqrt(var + eps), and a component's 1st and 99th percentile become 0 and 255.

M positions of latent maps, C latent channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.data.images import pm1_to_u8

EPS = 1e-4  # of models.latent_norm
DEAD = 1e-6  # a component of less variance, in units of a normalised channel's, is rounding noise
PERCENTILES = (1, 99)


@dataclass(frozen=True)
class Basis:
    """A map from latents to colours. Axes are orthonormal, in descending order of variance; those
    that do not exist (C < 3) or carry no variance are zero, and their colour is 128 everywhere."""

    mean: Tensor  # (C,)
    std: Tensor  # (C,)
    axes: Tensor  # (3, C)
    centre: Tensor  # (3,) of the colour range
    half: Tensor  # (3,) half its width

    def project(self, z: Tensor) -> Tensor:
        """(M, C) => (M, 3) float64."""
        return (z.double() - self.mean) / self.std @ self.axes.T

    def explained(self, z: Tensor) -> Tensor:
        """(3,) share of the variance of the normalised rows (M, C) along each axis."""
        total = (z.double() / self.std).var(0, correction=0).sum()
        return self.project(z).var(0, correction=0) / total.clamp(min=DEAD)

    def colours(self, z: Tensor) -> Tensor:
        """Maps (N, C, h, w) => (N, 3, h, w) uint8."""
        x_pm1 = (self.project(to_rows(z)) - self.centre) / self.half
        n, _, h, w = z.shape
        return pm1_to_u8(x_pm1.view(n, h, w, 3).permute(0, 3, 1, 2))


def to_rows(z: Tensor) -> Tensor:
    """Maps (N, C, h, w) => (N h w, C)."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def fit_basis(z: Tensor) -> Basis:
    """The basis of the rows (M, C), in any order."""
    var, mean = torch.var_mean(z.double(), 0, correction=0)
    std = (var + EPS).sqrt()
    axes = principal_axes((z.double() - mean) / std)
    bare = Basis(mean, std, axes, torch.zeros(3), torch.ones(3))
    low, high = torch.from_numpy(np.percentile(bare.project(z).numpy(), PERCENTILES, axis=0))
    return Basis(mean, std, axes, (low + high) / 2, ((high - low) / 2).clamp(min=EPS))


def principal_axes(z_n: Tensor) -> Tensor:
    """(3, C) for centred rows (M, C). The largest loading of each is positive; the first of equal
    ones, which rounding would otherwise choose."""
    values, vectors = torch.linalg.eigh(z_n.T @ z_n / len(z_n))  # ascending
    found = vectors[:, values > DEAD].T.flip(0)[:3]
    largest = found.abs().round(decimals=6).argmax(1, keepdim=True)
    axes = torch.zeros(3, z_n.shape[1], dtype=z_n.dtype)
    axes[: len(found)] = found * found.gather(1, largest).sign()
    return axes
