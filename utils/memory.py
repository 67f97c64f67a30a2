"""Memory of a training step, and of what a run leaves on disk, before anything is loaded.

The real training step runs on fake tensors (shapes and types, no numbers) while every allocation
and release is followed. So the estimate has what the code has: all phases, what is frozen, gradient
checkpointing and what it computes again, temporaries. Two batch sizes give each moment of the step
a constant and a slope, and these any batch size. Beside an independent count of the saved tensors
of the official modules (2172 and 1642 MB an image for f8d4 and f16d32): 2168 and 1649 MB.

Known limits: nothing here was compared with a GPU. The fake device is the CPU, told to normalise
in float32 under autocast as GPUs do (their other float32 operations matter in none of these
networks). Workspaces of kernels, the CUDA context, NCCL and gaps in torch's caching allocator are
not seen: `RESERVE` stands for them, an assumption. Eager only: `run.compile` needs less. Gradients
count as always there, as the buckets of DDP are; on one GPU without micro-batches they come and go.
Previews and evaluations are not in it.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import lpips
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loss.reconstruction import LeCam
from models.encoders import load_encoder
from models.vae import build_vae
from utils.build import Nets, build_disc, build_sit, count, set_up
from utils.config import Config
from utils.draws import Draws
from utils.ema import make_ema

GIB = 2**30
RESERVE = 3 * GIB  # CUDA context, NCCL, cuDNN workspaces, allocator gaps: assumed, not measured
PROBES = (2, 3)  # batch sizes that are tried; with 1, some kernels take another path


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


def skeleton(c: Config, num_classes: int) -> Nets:
    """The networks of a run on the meta device: shapes without numbers. `UserError` where shapes do
    not meet. Weights that do not fit, or are not there, do not matter here."""
    with torch.device("meta"):
        vae = build_vae(c.vae.name)
        names, grid = c.encoder.names if c.uses_encoder else [], c.encoder_grid
        encoders = [load_encoder(n, "random", c.data.resolution, grid) for n in names]
        sit = build_sit(c, vae, num_classes, tuple(e.embed_dim for e in encoders))
        encoders = [] if c.encoder.cached else encoders
        disc = build_disc(replace(c, disc=replace(c.disc, weights=None))) if c.uses_disc else None
        net = _empty_lpips() if c.vae.train and c.loss.reg.lpips else None
        lecam = LeCam() if disc and c.loss.reg.lecam else None
    # the loss scale of fp16 would be read back, which fake tensors refuse; sizes are those of bf16
    precision = "bf16" if c.run.precision == "fp16" else c.run.precision
    return Nets(vae, sit, disc, encoders, net, lecam, make_ema(sit), precision=precision)


def _empty_lpips() -> lpips.LPIPS:
    with warnings.catch_warnings():  # it calls torchvision by arguments that are deprecated
        warnings.simplefilter("ignore", UserWarning)
        net = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    return net.eval().requires_grad_(False)


def checkpoint_bytes(nets: Nets, c: Config) -> int:
    """One checkpoint: VAE, SiT, its EMA, discriminator, and two moments of what trains; float32."""
    disc = count(nets.disc) if nets.disc else 0
    trained = count(nets.sit) + disc + c.vae.train * count(nets.vae)
    return 4 * (count(nets.vae) + 2 * count(nets.sit) + disc + 2 * trained)


def estimate(c: Config, nets: Nets, train_step: Callable) -> Estimate:
    """Run `train_step` (that of train_repae.py) on fake copies of `nets`, which are those of
    `skeleton(c, ...)` and are used up."""
    plain = replace(c.run, accumulation=1, compile=False, channels_last=False)
    c = replace(c, run=replace(plain, precision=nets.precision))
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # torch: "accessing the data pointer of FakeTensor"
        for net in _all(nets):
            _materialise(net)
        set_up(nets, c, OneProcess())
        resident = _make_resident(nets)
        curves = {n: live_curve(nets, c, train_step, n) for n in PROBES}
    lengths = {len(curve) for curve in curves.values()}
    assert len(lengths) == 1, f"a step has other operations for other batch sizes: {lengths}"
    return Estimate(resident, curves, _waiting_bytes(nets, c))


def live_curve(nets: Nets, c: Config, train_step: Callable, n: int) -> list[int]:
    """Bytes alive after each operation of a step of `n` images, beyond those alive before it."""
    side = c.data.resolution
    z = torch.zeros(n, *nets.vae.latent_shape(side))
    no = torch.zeros(n, dtype=torch.bool)
    draws = Draws(flip=no, posterior_noise=z, t=torch.zeros(n), eps=z.clone(), drop_label=no)
    x, y = torch.zeros(n, 3, side, side), torch.zeros(n, dtype=torch.long)
    late = c.disc.alone_steps + c.run.steps + c.loss.reg.gan_start  # every term takes part
    cached = cached_rows(nets, c, n)
    with norms_in_float32(nets), LiveBytes(old=resident_tensors(nets)) as live:
        for value in (x, y, z, draws.eps, *cached):  # the batch is memory of the step, too
            value.zero_()
        train_step(nets, x, y, draws, c, late, cached)
    return live.curve


def cached_rows(nets: Nets, c: Config, n: int) -> list[torch.Tensor]:
    """What a loader of cached latents hands over for `n` images."""
    if c.data.latents is None:
        return []
    copies = 1 + c.data.hflip
    shapes = [(2, *nets.vae.latent_shape(c.data.resolution))]
    if c.encoder.cached:
        shapes += [(nets.sit.grid**2, dim) for dim in nets.sit.config.encoder_dims]
    return [torch.zeros(n, copies, *shape, dtype=torch.float16) for shape in shapes]


def resident_tensors(nets: Nets) -> list[torch.Tensor]:
    """Weights, buffers, gradients, moments: what is there between two steps."""
    tensors = [t for net in _all(nets) for t in (*net.parameters(), *net.buffers())]
    for learner in nets.learn.values():
        tensors += [p.grad for p in learner.params]
        tensors += [t for state in learner.opt.state.values() for t in state.values()]
    return tensors


class OneProcess:
    """What `Learner` needs of an Accelerator, without joining or starting anything."""

    device = torch.device("cpu")

    def prepare_model(self, net: nn.Module) -> nn.Module:
        return net

    def no_sync(self, net: nn.Module) -> nullcontext:
        return nullcontext()

    def reduce(self, value: torch.Tensor, how: str) -> torch.Tensor:
        return value


def _all(nets: Nets) -> list[nn.Module]:
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
    net.to = lambda *_: net  # fake tensors cannot be moved (and need not be)


def _make_resident(nets: Nets) -> dict[str, int]:
    """Give every trained parameter its gradient and moments, to stay; bytes by purpose."""
    for learner in nets.learn.values():
        for p in learner.params:
            p.grad = torch.zeros_like(p)
        learner.opt.step()
        learner.opt.zero_grad = lambda set_to_none: None
    trained = 4 * sum(p.numel() for learner in nets.learn.values() for p in learner.params)
    weights = sum(_bytes(net) for net in _all(nets))
    return {"weights and EMA": weights, "gradients": trained, "Adam": 2 * trained}


def _bytes(net: nn.Module) -> int:
    tensors = (*net.parameters(), *net.buffers())
    return sum(t.numel() * t.element_size() for t in tensors)


def _waiting_bytes(nets: Nets, c: Config) -> int:
    """Of one image: itself twice (as loaded, and mirrored), its reconstruction, latent, normalised
    latent and two noises in float32, and its encoder tokens in at most float32."""
    channels, height, width = nets.vae.latent_shape(c.data.resolution)
    images = (3 if c.vae.train else 2) * 3 * c.data.resolution**2
    tokens = sum(encoder.grid**2 * encoder.embed_dim for encoder in nets.encoders)
    cached = sum(rows.numel() for rows in cached_rows(nets, c, 1))  # as loaded, and in float32
    return 4 * (images + 4 * channels * height * width + tokens + cached)


@contextmanager
def norms_in_float32(nets: Nets) -> Iterator[None]:
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
