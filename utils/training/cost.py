"""Memory of a training step, and of what a run leaves on disk, before anything is loaded.

The real training step runs on fake tensors (shapes and types, no numbers) while every allocation
and release is counted: all phases, frozen networks, gradient checkpointing, temporaries. It runs
with 2 and with 3 images. After each operation, memory is taken to be linear in the number of
images, so these two runs give it for any batch. As a check, the saved tensors of the official
modules were counted independently: 2172 MB an image for f8d4, 1642 MB for f16d32; the estimate
gives 2168 and 1649 MB.

Known limits. Nothing was compared with a GPU. The fake device is the CPU; its norms are made to
run in float32 under autocast, as those of GPUs do. Workspaces of kernels, the CUDA context, NCCL
and gaps in torch's caching allocator are not seen; `RESERVE` is an assumption about them. The step
is not compiled: `run.compile` needs less. Gradients are counted as permanent, which holds under
DDP; on one GPU without micro-batches they are freed between phases, so the estimate is a little
high. Previews and evaluations are not included.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn as nn
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.lpips import build_lpips
from utils.config.schema import Config
from utils.training.draws import Draws
from utils.training.ema import EmaUpdate
from utils.training.networks import Networks, count, prepare_for_training

GIB = 2**30
# CUDA context, NCCL, cuDNN workspaces, gaps in the allocator: assumed, not measured.
RESERVE = 3 * GIB
# Batch sizes that are tried; with 1, some kernels take another path.
PROBES = (2, 3)


class LiveBytes(TorchDispatchMode):
    """Follows the tensors made inside: `now` bytes of them are alive, `curve` has that after every
    operation. A storage counts once, however many views and saved tensors share it; those of
    `old`, which were there before, do not count."""

    def __init__(self, old: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now, self.curve, self._alive = 0, [], {}
        self._old = {t.untyped_storage()._cdata for t in old}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        self.curve.append(self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive and key not in self._old:
            self.now += size
            self._alive[key] = weakref.ref(storage, lambda _: self._drop(key, size))

    def _drop(self, key: int, size: int) -> None:
        self.now -= size
        del self._alive[key]


@dataclass
class Estimate:
    """Bytes of one rank: `resident` between two steps, by purpose; `curves`, those alive beyond
    them after each operation of a step, for two numbers of images; `waiting`, of an image whose
    micro-batch is not being worked on."""

    resident: dict[str, int]
    curves: dict[int, list[int]]
    waiting: int

    def peak(self, rank_batch: int, accumulation: int = 1) -> int:
        """Of `rank_batch` images in `accumulation` micro-batches, without `RESERVE`."""
        micro = rank_batch // accumulation
        (few, low), (more, high) = self.curves.items()
        slope = (micro - few) / (more - few)
        moments = (a + (b - a) * slope for a, b in zip(low, high))
        kept = self.waiting * (rank_batch - micro)
        return int(sum(self.resident.values()) + max(moments) + kept)

    def accumulation_that_fits(self, rank_batch: int, memory: int) -> int | None:
        """The fewest equal micro-batches with which a step fits into `memory` bytes."""
        ways = (k for k in range(1, rank_batch + 1) if rank_batch % k == 0)
        return next((k for k in ways if self.peak(rank_batch, k) + RESERVE <= memory), None)


def checkpoint_bytes(nets: Networks, c: Config) -> int:
    """One checkpoint: VAE, SiT, its EMA, discriminator, and two moments of what trains; float32."""
    disc = count(nets.disc) if nets.disc else 0
    trained = count(nets.sit) + disc + c.vae.train * count(nets.vae)
    return 4 * (count(nets.vae) + 2 * count(nets.sit) + disc + 2 * trained)


def estimate(c: Config, nets: Networks, train_step: Callable) -> Estimate:
    """Run `train_step` (that of train_repae.py) on fake copies of `nets`, which are those of
    `skeleton(c, ...)` and are used up."""
    plain = replace(c.run, accumulation=1, compile=False, channels_last=False)
    c = replace(c, run=replace(plain, precision=nets.precision))
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # torch: "accessing the data pointer of FakeTensor"
        if c.vae.train and c.loss.reg.lpips:
            with torch.device("meta"):
                nets.lpips = build_lpips()
        for net in _all(nets):
            _materialise(net)
        prepare_for_training(nets, c, cast(Accelerator, OneProcess()))
        nets.update_ema = EmaUpdate(nets.ema, nets.sit)
        resident = _make_resident(nets)
        curves = {n: live_curve(nets, c, train_step, n) for n in PROBES}
    lengths = {len(curve) for curve in curves.values()}
    assert len(lengths) == 1, f"a step has other operations for other batch sizes: {lengths}"
    return Estimate(resident, curves, _waiting_bytes(nets, c))


def live_curve(nets: Networks, c: Config, train_step: Callable, n: int) -> list[int]:
    """Bytes alive after each operation of a step of `n` images, beyond those alive before it."""
    side = c.data.resolution
    z = torch.zeros(n, *nets.vae.latent_shape(side))
    no = torch.zeros(n, dtype=torch.bool)
    draws = Draws(flip=no, posterior_noise=z, t=torch.zeros(n), eps=z.clone(), drop_label=no)
    x, y = torch.zeros(n, 3, side, side), torch.zeros(n, dtype=torch.long)
    late = c.disc.pretrain_steps + c.run.steps + c.loss.reg.gan_start  # every term takes part
    cached = cached_rows(nets, c, n)
    with norms_in_float32(nets), LiveBytes(old=resident_tensors(nets)) as live:
        for value in (x, y, z, draws.eps, *cached):  # the batch is memory of the step, too
            value.zero_()
        train_step(nets, x, y, draws, c, late, cached)
    return live.curve


def cached_rows(nets: Networks, c: Config, n: int) -> list[torch.Tensor]:
    """What a loader of cached latents hands over for `n` images."""
    if c.data.latents is None:
        return []
    copies = 1 + c.data.hflip
    shapes = [(2, *nets.vae.latent_shape(c.data.resolution))]
    if c.encoder.cached:
        shapes += [(nets.sit.grid**2, dim) for dim in nets.sit.config.encoder_dims]
    return [torch.zeros(n, copies, *shape, dtype=torch.float16) for shape in shapes]


def resident_tensors(nets: Networks) -> list[torch.Tensor]:
    """Weights, buffers, gradients, moments: what is there between two steps."""
    tensors = [t for net in _all(nets) for t in (*net.parameters(), *net.buffers())]
    for trained in nets.trained.values():
        tensors += [p.grad for p in trained.params if p.grad is not None]
        tensors += [t for state in trained.opt.state.values() for t in state.values()]
    return tensors


class OneProcess:
    """What `TrainedNetwork` needs of an Accelerator, without joining or starting anything."""

    device = torch.device("cpu")

    def prepare_model(self, net: nn.Module) -> nn.Module:
        return net

    def no_sync(self, net: nn.Module) -> nullcontext:
        return nullcontext()

    def reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        return value


def _all(nets: Networks) -> list[nn.Module]:
    single = (nets.vae, nets.sit, nets.ema, nets.disc, nets.lpips, nets.lecam)
    return [net for net in (*single, *nets.encoders) if net is not None]


def _materialise(net: nn.Module) -> None:
    """Meta => fake tensors, in place."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _make_resident(nets: Networks) -> dict[str, int]:
    """Give every trained parameter its gradient and moments, to stay; bytes by purpose."""
    for trained in nets.trained.values():
        for p in trained.params:
            p.grad = torch.zeros_like(p)
        trained.opt.step()
        setattr(trained.opt, "zero_grad", lambda set_to_none: None)  # noqa: B010
    gradients = 4 * sum(p.numel() for trained in nets.trained.values() for p in trained.params)
    weights = sum(_bytes(net) for net in _all(nets))
    return {"weights and EMA": weights, "gradients": gradients, "Adam": 2 * gradients}


def _bytes(net: nn.Module) -> int:
    tensors = (*net.parameters(), *net.buffers())
    return sum(t.numel() * t.element_size() for t in tensors)


def _waiting_bytes(nets: Networks, c: Config) -> int:
    """Of one image: itself twice (as loaded, and mirrored), its reconstruction, latent, normalised
    latent and two noises in float32, and its encoder tokens in at most float32."""
    channels, height, width = nets.vae.latent_shape(c.data.resolution)
    images = (3 if c.vae.train else 2) * 3 * c.data.resolution**2
    tokens = sum(encoder.grid**2 * encoder.embed_dim for encoder in nets.encoders)
    cached = sum(rows.numel() for rows in cached_rows(nets, c, 1))  # as loaded, and in float32
    return 4 * (images + 4 * channels * height * width + tokens + cached)


@contextmanager
def norms_in_float32(nets: Networks) -> Iterator[None]:
    """Under autocast, GPUs normalise in float32 and the CPU does not: cast as a GPU would."""

    def cast(module: nn.Module, args: tuple) -> tuple:
        return (args[0].float(), *args[1:]) if torch.is_autocast_enabled("cpu") else args

    modules = (m for net in _all(nets) for m in net.modules() if _is_norm(m))
    handles = [module.register_forward_pre_hook(cast) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.GroupNorm | nn.LayerNorm) or "RMS" in type(module).__name__
