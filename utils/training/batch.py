"""The images of one training step, as the step sees them, and averages over its micro-batches."""

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


class MetricAverages:
    """`num` micro-batches: every `add` contributes a `num`-th to the mean of its values."""

    def __init__(self, num: int):
        self.num = num
        self.losses: dict[str, Tensor] = {}
        self.other: dict[str, Tensor] = {}

    def add_losses(self, terms: dict[str, tuple[float, Tensor]]) -> Tensor:
        """{name: (weight, value)} of one micro-batch => its share of the loss to differentiate."""
        self._average(self.losses, {name: value for name, (_, value) in terms.items()})
        first, *others = (weight * value for weight, value in terms.values())
        loss = sum(others, start=first)
        return loss if self.num == 1 else loss / self.num

    def add(self, **values: Tensor) -> None:
        """Average values that are logged, but are no loss."""
        self._average(self.other, values)

    def _average(self, means: dict, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            share = value.detach() if self.num == 1 else value.detach() / self.num
            means[name] = means[name] + share if name in means else share

    def metrics(self, phase: str) -> dict[str, Tensor]:
        """{"loss/PHASE/NAME": unweighted mean, "PHASE/NAME": mean of what is no loss}."""
        losses = {f"loss/{phase}/{name}": mean for name, mean in self.losses.items()}
        return losses | {f"{phase}/{name}": mean for name, mean in self.other.items()}
