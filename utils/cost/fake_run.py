"""A run's networks as fake CUDA tensors, and one step of them, counted."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from torch import Tensor

from models.lpips import build_lpips
from utils.config.schema import Config
from utils.cost.counter import Counter
from utils.cost.fake_cuda import fake_cuda, new_mode
from utils.training.draws import Draws
from utils.training.ema import EmaUpdate
from utils.training.networks import Networks, prepare_for_training
from utils.training.phases import observed

DEVICE = torch.device("cuda")
# What each rank does for its share of the parameters alone, under run.shard_optimizer.
SHARED_OUT = ("_fused_adamw_", "_foreach_lerp_")


class OneProcess:
    """What `TrainedNetwork` needs of an Accelerator, without joining or starting anything."""

    device = DEVICE
    num_processes, process_index = 1, 0

    def prepare_model(self, net: nn.Module) -> nn.Module:
        return net

    def no_sync(self, net: nn.Module) -> nullcontext:
        return nullcontext()

    def reduce(self, value: Tensor, how: str) -> Tensor:
        return value


class FakeRun:
    """The networks of `c` as fake CUDA tensors, made of `nets`, which are those of
    `skeleton(c, ...)` and are used up. Nothing is compiled.

    `resident`: bytes that are there between two steps on one of `ranks` ranks, by purpose; the
    gradients count as such.
    """

    def __init__(self, c: Config, nets: Networks, ranks: int = 1):
        self.config, self.nets = replace(c, run=replace(c.run, compile=False)), nets
        self._mode = new_mode()
        with self._fake():
            if c.vae.train and c.loss.reg.lpips:
                with torch.device("meta"):
                    nets.lpips = build_lpips()
            for net in all_networks(nets):
                _materialise(net)
            prepare_for_training(nets, self.config, cast(Accelerator, OneProcess()))
            nets.update_ema = EmaUpdate(nets.ema, nets.sit)
            for trained in nets.trained.values():  # the first update makes the moments
                for p in trained.params:
                    p.grad = torch.zeros_like(p)
                trained.opt.step()
                trained.opt.zero_grad()
                trained.scaler.scale(torch.zeros((), device=DEVICE))  # makes the scale
        gradients = 4 * sum(p.numel() for trained in nets.trained.values() for p in trained.params)
        weights = [net for net in all_networks(nets) if net is not nets.ema]
        owners = self._owners = ranks if c.run.shard_optimizer else 1
        self.resident = {
            "weights": sum(map(_bytes, weights)),
            "EMA": _bytes(nets.ema) // owners,
            "gradients": gradients,
            "Adam": 2 * gradients // owners,
        }

    @contextmanager
    def _fake(self) -> Iterator:
        with warnings.catch_warnings(), fake_cuda(self._mode) as backward:
            warnings.simplefilter("ignore")  # torch: "accessing the data pointer of FakeTensor"
            yield backward

    def step(self, train_step: Callable, images: int, accumulation: int = 1) -> Counter:
        """What `train_step` (that of train_repae.py) does with so many images, when every term of
        the loss takes part."""
        nets, run = self.nets, replace(self.config.run, accumulation=accumulation)
        c = replace(self.config, run=run)
        late = c.disc.pretrain_steps + run.steps + c.loss.reg.gan_start
        with self._fake() as backward, Counter(old=self._resident_tensors()) as counter:
            backward.arrived = counter.keep
            x, y, draws, cached = self._batch(images)
            counter.counted.clear()  # the loader's work
            with observed(counter):
                train_step(nets, x, y, draws, c, late, cached)
            for trained in nets.trained.values():
                trained.opt.zero_grad()
        for each in counter.counted:
            if each.op.name in SHARED_OUT:
                each.op.read //= self._owners
                each.op.written //= self._owners
        return counter

    def _batch(self, n: int) -> tuple[Tensor, Tensor, Draws, list[Tensor]]:
        side, nets = self.config.data.resolution, self.nets
        with DEVICE:
            z, eps = (torch.zeros(n, *nets.vae.latent_shape(side)) for _ in range(2))
            flip, drop = (torch.zeros(n, dtype=torch.bool) for _ in range(2))
            draws = Draws(flip, posterior_noise=z, t=torch.zeros(n), eps=eps, drop_label=drop)
            x, y = torch.zeros(n, 3, side, side), torch.zeros(n, dtype=torch.long)
            if nets.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            cached = cached_rows(nets, self.config, n)
        return x, y, draws, cached

    def _resident_tensors(self) -> list[Tensor]:
        """Weights, buffers, moments: what is there between two steps."""
        nets = self.nets
        tensors = [t for net in all_networks(nets) for t in (*net.parameters(), *net.buffers())]
        for trained in nets.trained.values():
            tensors += [t for state in trained.opt.state.values() for t in state.values()]
        return tensors


def cached_rows(nets: Networks, c: Config, n: int) -> list[Tensor]:
    """What a loader of cached latents hands over for `n` images."""
    if c.data.latents is None:
        return []
    copies = 1 + c.data.hflip
    shapes = [(2, *nets.vae.latent_shape(c.data.resolution))]
    if c.encoder.cached:
        shapes += [(nets.sit.grid**2, dim) for dim in nets.sit.config.encoder_dims]
    return [torch.zeros(n, copies, *shape, dtype=torch.float16) for shape in shapes]


def all_networks(nets: Networks) -> list[nn.Module]:
    single = (nets.vae, nets.sit, nets.ema, nets.disc, nets.lpips, nets.perceptual, nets.lecam)
    return [net for net in (*single, *nets.encoders) if net is not None]


def _materialise(net: nn.Module) -> None:
    """Meta => fake CUDA tensors, in place."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty_like(p, device=DEVICE)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty_like(b, device=DEVICE)


def _bytes(net: nn.Module) -> int:
    tensors = (*net.parameters(), *net.buffers())
    return sum(t.numel() * t.element_size() for t in tensors)
