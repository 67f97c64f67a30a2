"""Memory of a training step, and of what a run leaves on disk, before anything is loaded.

The real step runs on fake CUDA tensors while every allocation and release is counted: all phases,
frozen networks, gradient checkpointing, temporaries. It runs with 2 and with 3 images. After each
operation, memory is taken to be linear in the number of images, so these two runs give it for any
batch.

Known limits. Nothing was compared with a GPU. Workspaces of kernels, the CUDA context, NCCL and
gaps in torch's caching allocator are not seen; `RESERVE` is an assumption about them. The step is
not compiled: `run.compile` needs less. Gradients are counted as permanent, which holds under DDP;
on one GPU without micro-batches they are freed between phases, so the estimate is a little high.
Previews and evaluations are not included.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from models.weights.loading import count
from utils.config.schema import Config
from utils.cost.counter import Counted
from utils.cost.fake_run import FakeRun, cached_rows
from utils.training.networks import Networks

GIB = 2**30
# CUDA context, NCCL, cuDNN workspaces, gaps in the allocator: assumed, not measured.
RESERVE = 3 * GIB
# Batch sizes that are tried; with 1, some kernels take another path.
PROBES = (2, 3)


@dataclass
class Estimate:
    """Bytes of one rank: `resident` between two steps, by purpose; `curves`, those alive beyond
    them after each operation of a step, for two numbers of images; `waiting`, of an image whose
    micro-batch is not being worked on. `counted`: the operations of these two steps."""

    resident: dict[str, int]
    curves: dict[int, list[int]]
    waiting: int
    counted: dict[int, list[Counted]] = field(default_factory=dict)

    def peak(self, rank_batch: int, accumulation: int = 1) -> int:
        """Of `rank_batch` images in `accumulation` micro-batches, without `RESERVE`."""
        micro = rank_batch // accumulation
        (few, low), (more, high) = self.curves.items()
        slope = (micro - few) / (more - few)
        moments = (a + (b - a) * slope for a, b in zip(low, high))
        kept = self.waiting * (rank_batch - micro)
        return int(sum(self.resident.values()) + max(moments) + kept)

    def accumulation_that_fits(self, rank_batch: int, memory: int, least: int = 1) -> int | None:
        """The fewest equal micro-batches, `least` or more, with which a step fits into `memory`
        bytes."""
        ways = (k for k in range(least, rank_batch + 1) if rank_batch % k == 0)
        return next((k for k in ways if self.peak(rank_batch, k) + RESERVE <= memory), None)


def estimate(c: Config, nets: Networks, train_step: Callable, ranks: int = 1) -> Estimate:
    """The memory of a step of `train_step` (that of train_repae.py). `nets` are those of
    `skeleton(c, ...)`, and are used up."""
    run = FakeRun(c, nets, ranks)
    counted = {n: run.step(train_step, n).counted for n in PROBES}
    curves = {n: [each.alive for each in steps] for n, steps in counted.items()}
    lengths = {len(curve) for curve in curves.values()}
    assert len(lengths) == 1, f"a step has other operations for other batch sizes: {lengths}"
    return Estimate(run.resident, curves, waiting_bytes(nets, c), counted)


def waiting_bytes(nets: Networks, c: Config) -> int:
    """Of one image: itself twice (as loaded, and mirrored), its reconstruction, latent, normalised
    latent and two noises in float32, and its encoder tokens in at most float32."""
    channels, height, width = nets.vae.latent_shape(c.data.resolution)
    images = (3 if c.vae.train else 2) * 3 * c.data.resolution**2
    tokens = sum(encoder.grid**2 * encoder.embed_dim for encoder in nets.encoders)
    cached = sum(rows.numel() for rows in cached_rows(nets, c, 1))  # as loaded, and in float32
    return 4 * (images + 4 * channels * height * width + tokens + cached)


def checkpoint_bytes(nets: Networks, c: Config) -> int:
    """One checkpoint: VAE, SiT, its EMA, discriminator, and two moments of what trains; float32."""
    disc = count(nets.disc) if nets.disc else 0
    trained = count(nets.sit) + disc + c.vae.train * count(nets.vae)
    return 4 * (count(nets.vae) + 2 * count(nets.sit) + disc + 2 * trained)
