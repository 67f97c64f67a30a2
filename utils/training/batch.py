"""The images of one training step, as the step sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.data.images import u8_to_pm1
from utils.training.draws import Draws


@dataclass(frozen=True)
class Batch:
    """The images of one rank in one step, or one micro-batch of them."""

    x: Tensor  # (N, 3, H, W) in [-1, 1]
    y: Tensor  # (N,) int64
    draws: Draws
    feats: Sequence[Tensor] = ()  # (N, T, D_enc) of each frozen encoder; () = nothing is aligned
    posterior: Tensor | None = None  # (N, 2, C, h, w) cached mean and std; None = run the VAE

    def split(self, num: int) -> list[Batch]:
        """`num` micro-batches, in order."""
        feats = list(zip(*(f.chunk(num) for f in self.feats))) or [()] * num
        posterior = [None] * num if self.posterior is None else self.posterior.chunk(num)
        parts = (
            self.x.chunk(num),
            self.y.chunk(num),
            self.draws.split(num),
            feats,
            posterior,
        )
        return [Batch(*part) for part in zip(*parts)]


def make_batch(x: Tensor, y: Tensor, draws: Draws, cached: Sequence[Tensor], hflip: bool) -> Batch:
    """The images, or what is cached in their place, mirrored where `draws.flip` says so."""
    if hflip:
        x = torch.where(draws.flip[:, None, None, None], x.flip(-1), x)
    if not cached:
        return Batch(x, y, draws)
    copy = draws.flip.long() if hflip else torch.zeros_like(y)
    rows = torch.arange(len(y), device=y.device)
    posterior, *feats = (c[rows, copy].float() for c in cached)
    return Batch(x, y, draws, feats, posterior)


def to_device(
    rows: Sequence[Tensor], device: torch.device, channels_last: bool
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """A loader's rows on the device: images (N, 3, H, W) in [-1, 1], labels (N,), cached rows.

    The images come as NHWC memory, which is what `channels_last` convolutions want.
    """
    x_u8, y, *cached = (row.to(device, non_blocking=True) for row in rows)
    x = u8_to_pm1(x_u8)
    return x if channels_last else x.contiguous(), y, cached
