"""Projectors from SiT tokens to the channels of a frozen encoder. N batch, T tokens, D width."""

import torch
import torch.nn as nn


def mlp_projector(hidden_size: int, encoder_dim: int, projector_dim: int = 2048) -> nn.Sequential:
    """(N, T, D) => (N, T, encoder_dim), token by token, as in REPA (arXiv 2410.06940)."""
    return nn.Sequential(
        nn.Linear(hidden_size, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, projector_dim),
        nn.SiLU(),
        nn.Linear(projector_dim, encoder_dim),
    )


class ConvProjector(nn.Conv2d):
    """(N, T, D) => (N, T, encoder_dim) by one 3x3 convolution on the square token grid: the
    projector of iREPA (arXiv 2512.10794)."""

    def __init__(self, hidden_size: int, encoder_dim: int):
        super().__init__(hidden_size, encoder_dim, kernel_size=3, padding=1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        side = round(h.shape[1] ** 0.5)
        grid = h.transpose(1, 2).unflatten(2, (side, side))  # (N, D, side, side)
        return super().forward(grid).flatten(2).transpose(1, 2)


def build_projector(kind: str, hidden_size: int, encoder_dim: int, projector_dim: int) -> nn.Module:
    """A projector of REPA (`kind` "mlp") or iREPA ("conv", which has no use for projector_dim)."""
    if kind == "conv":
        return ConvProjector(hidden_size, encoder_dim)
    assert kind == "mlp", kind
    return mlp_projector(hidden_size, encoder_dim, projector_dim)
