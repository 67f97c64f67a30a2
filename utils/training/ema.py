"""Exponential moving average of a network's weights and of its floating-point buffers."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn as nn

from utils.training.trained_network import Shares

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
    make a new one if a tensor of either network is replaced by another.

    `shares` of the parameters of `net`: each rank updates and keeps only what it owns of `ema`. The
    other parameters then are on the meta device, without memory, except inside `whole`.
    """

    def __init__(self, ema: nn.Module, net: nn.Module, shares: Shares | None = None):
        self.ema, self.shares, self.names = ema, shares, []
        if shares:
            names = {id(p): name for name, p in net.named_parameters()}
            self.names = [names[id(p)] for p in shares.params]
        owners = zip(self.names, shares.owners if shares else [])
        self.dropped = [name for name, owner in owners if shares and owner != shares.rank]
        targets, sources = ema.state_dict(), net.state_dict()
        assert targets.keys() == sources.keys(), targets.keys() ^ sources.keys()
        kept = {name: value for name, value in sources.items() if name not in {*self.dropped}}
        averaged = [name for name, value in kept.items() if value.is_floating_point()]
        self.averages = [targets[name] for name in averaged]
        self.values = [kept[name] for name in averaged]
        self.copies = [(targets[n], v) for n, v in kept.items() if not v.is_floating_point()]
        self._place("meta")

    @torch.no_grad()
    def __call__(self, decay: float, left_out: torch.Tensor | None = None) -> None:
        """`left_out` (), bool: whether `ema` stays as it is, known to the device alone."""
        lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
        if left_out is None:
            lerp(self.averages, self.values, 1 - decay)
        else:
            weight = torch.where(left_out, 0.0, 1 - decay)
            lerp(self.averages, self.values, [weight] * len(self.values))
        for target, value in self.copies:
            target.copy_(value if left_out is None else torch.where(left_out, target, value))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All ranks together: inside, each holds all of `ema`, for what samples or saves it."""
        if not self.shares:
            yield
            return
        self._place(self.averages[0].device)
        self.shares.exchange([self.ema.get_parameter(name) for name in self.names])
        try:
            yield
        finally:
            self._place("meta")

    def _place(self, device: torch.device | str) -> None:
        """Put new tensors, without values, in place of the parameters that other ranks own."""
        for name in self.dropped:
            owner, _, leaf = name.rpartition(".")
            p = torch.empty_like(self.ema.get_parameter(name), device=device)
            setattr(self.ema.get_submodule(owner), leaf, nn.Parameter(p, requires_grad=False))
