"""Exponential moving average of a network's weights and of its floating-point buffers."""

import copy

import torch
import torch.nn as nn


def make_ema(net: nn.Module) -> nn.Module:
    """A frozen copy in eval mode. Call it when all ranks hold the same weights."""
    return copy.deepcopy(net).eval().requires_grad_(False)


def ema_decay(step: int, decay: float, warmup: bool) -> float:
    """Decay of step `step` (0-based); with warm-up a short run forgets its random start."""
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * net; running statistics too, integer buffers copied."""
    averages, values = [], []
    targets = ema.state_dict()
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            averages.append(targets[name])
            values.append(value)
        else:
            targets[name].copy_(value)
    torch._foreach_lerp_(averages, values, 1 - decay)
