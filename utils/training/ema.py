"""Exponential moving average of a network's weights and of its floating-point buffers."""

import copy
from typing import TypeVar

import torch
import torch.nn as nn

Network = TypeVar("Network", bound=nn.Module)


def make_ema(net: Network) -> Network:
    """A frozen copy in eval mode. Call it when all ranks hold the same weights."""
    return copy.deepcopy(net).eval().requires_grad_(False)


def ema_decay(step: int, decay: float, warmup: bool) -> float:
    """Decay of step `step` (0-based); with warm-up a short run forgets its random start."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class EmaUpdate:
    """Updates `ema` from `net`: ema <- decay * ema + (1 - decay) * net, running statistics
    included; integer buffers are copied. The pairs of tensors are listed once, not at every step:
    make a new one if a tensor of either network is replaced by another."""

    def __init__(self, ema: nn.Module, net: nn.Module):
        targets, sources = ema.state_dict(), net.state_dict()
        assert targets.keys() == sources.keys(), targets.keys() ^ sources.keys()
        averaged = [name for name, value in sources.items() if value.is_floating_point()]
        self.averages = [targets[name] for name in averaged]
        self.values = [sources[name] for name in averaged]
        self.copies = [(targets[n], v) for n, v in sources.items() if not v.is_floating_point()]

    @torch.no_grad()
    def __call__(self, decay: float, left_out: torch.Tensor | None = None) -> None:
        """`left_out` (), bool: whether `ema` stays as it is, known to the device alone."""
        if left_out is not None:
            self._unless(left_out, 1 - decay)
            return
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        lerp(self.averages, self.values, 1 - decay)
        for target, value in self.copies:
            target.copy_(value)

    def _unless(self, left_out: torch.Tensor, weight: float) -> None:
        weights = torch.where(left_out, 0.0, weight)
        for target, value in zip(self.averages, self.values):
            target.lerp_(value, weights)
        for target, value in self.copies:
            target.copy_(torch.where(left_out, target, value))
