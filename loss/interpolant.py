"""The path between data (t = 0) and noise (t = 1): x_t = alpha(t) z + sigma(t) eps.

Stochastic interpolants (SiT, arXiv 2401.08740, Sec. 2). Training and sampling both take the
coefficients from here. torch is imported for type checkers only, so that a parser of arguments can
read `PATHS` without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

PATHS = ("linear", "cosine")  # the first one is the default


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives by t, each of t's shape: (N,) or scalar."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    d_alpha: torch.Tensor
    d_sigma: torch.Tensor


def coefficients(t: torch.Tensor, path: str = "linear") -> Coefficients:
    """linear: 1 - t, t; cosine: cos(pi t / 2), sin(pi t / 2)."""
    if path == "linear":
        one = t.new_ones(t.shape)
        return Coefficients(1 - t, t, -one, one)
    assert path == "cosine", path
    angle = t * (math.pi / 2)
    cos, sin = angle.cos(), angle.sin()
    return Coefficients(cos, sin, -math.pi / 2 * sin, math.pi / 2 * cos)


def interpolate(
    z_n: torch.Tensor, eps: torch.Tensor, t: torch.Tensor, path: str = "linear"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised latent and noise (N, C, h, w) at t (N,) => x_t and its velocity v = dx_t/dt."""
    alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1, 1, 1) for c in coefficients(t, path))
    return alpha * z_n + sigma * eps, d_alpha * z_n + d_sigma * eps


def score_from_velocity(
    v: torch.Tensor, x: torch.Tensor, t: torch.Tensor, path: str = "linear"
) -> torch.Tensor:
    """Score of the marginal at scalar time t in (0, 1] from the velocity at x (N, C, h, w)."""
    alpha, sigma, d_alpha, d_sigma = coefficients(t, path)
    ratio = alpha / d_alpha
    return (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)


def time_from_normal(n: torch.Tensor, path: str = "linear") -> torch.Tensor:
    """Standard normal (N,) => log-normal times in (0, 1): noise-to-data ratio s = exp(n)."""
    s = n.exp()
    return s / (1 + s) if path == "linear" else 2 / math.pi * s.atan()
