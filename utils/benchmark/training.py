"""Steps of training: the real step, on networks with random weights and images made up or real.

Weights and pixels do not change what a step costs, so that nothing has to be downloaded. Made-up
images wait in the memory of the host, pinned as a loader's are, and go to the device at every step.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from models.checks.errors import UserError
from utils.benchmark import machine
from utils.benchmark.clock import PhaseClock, phase_medians, spread
from utils.config.schema import Config, per_rank_batch
from utils.data.base import Source
from utils.data.latents import CachedSource
from utils.data.registry import open_source
from utils.data.training import join_cache, open_loader, open_training_data
from utils.distributed import Ranks
from utils.files import DRAFT
from utils.process.written import PROGRAM
from utils.training.batch import to_device
from utils.training.draws import drawing
from utils.training.networks import Networks, build_networks
from utils.training.phases import observed

STATS_IMAGES = 32  # a VAE without statistics is measured on; as good as any for random weights
COUNTED_IMAGES = 2  # whose FLOPs are counted: one alone has no statistics in a batch norm
TRACED_STEPS = 3
ENDLESS = 10**9  # steps


def with_random_weights(c: Config) -> Config:
    """A config of the same networks that reads no weights and downloads nothing; only the VAE and
    the encoders of cached latents keep theirs, since a cache belongs to them, and the perceptual
    loss its file, if it is here, as it states the size of images."""
    known = min(c.latent_norm.stats_images, STATS_IMAGES)
    reg, joined = replace(c.loss.reg, lpips_weights="random"), c.data.latents is not None
    if reg.perceptual_net and not os.path.isfile(reg.perceptual_net.partition("@")[2]):
        reg.perceptual_net = f"{reg.perceptual_net.partition('@')[0]}@random"
    vae, init_from = (c.vae, c.run.init_from) if joined else (replace(c.vae, weights=None), None)
    encoder = c.encoder
    if not encoder.cached:
        encoder = replace(encoder, weights=["random"] * len(encoder.names))
    return replace(
        c,
        run=replace(c.run, init_from=init_from, resume="never", trackers=[], steps=ENDLESS),
        vae=vae,
        disc=replace(c.disc, weights=None),
        latent_norm=replace(c.latent_norm, stats_images=known),
        encoder=encoder,
        loss=replace(c.loss, reg=reg),
    )


class Training:
    """Training that is ready for its steps. With `real_data`, the data of the config."""

    def __init__(
        self, config: Config, accelerator: Accelerator, train_step: Callable, real_data: bool
    ):
        self.config = c = with_random_weights(config)
        self.train_step, self.device = train_step, accelerator.device
        self.rank_batch = per_rank_batch(c, accelerator.num_processes)
        images, training_set = open_real(c) if real_data else open_made_up(c)
        cache = training_set.cache if isinstance(training_set, CachedSource) else None
        self.nets: Networks = build_networks(c, images, accelerator, cache=cache)[0]
        # every term of the loss takes part
        self.next = c.disc.pretrain_steps + c.loss.reg.gan_start
        if real_data:
            loader = open_loader(c, training_set, accelerator, first=self.next)
            self.batches: Iterator = iter(loader)
        else:
            self.batches = repeat(self.made_up_batch(images.num_classes))
        self.draws = drawing(c, accelerator.process_index, self.device)

    def made_up_batch(self, num_classes: int) -> list[Tensor]:
        """Noise, as a loader hands it over: images (B, 3, H, W) uint8 in NHWC memory, labels."""
        n, side = self.rank_batch, self.config.data.resolution
        x_u8 = torch.randint(256, (n, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        rows = [x_u8, torch.arange(n) % num_classes]
        return [row.pin_memory() for row in rows] if self.device.type == "cuda" else rows

    def step(self, clock: PhaseClock) -> dict[str, Tensor]:
        """One step, as in training; its metrics, still on the device."""
        with clock.step(), observed(clock):
            with clock.waiting_for_data():
                x, y, cached = to_device(next(self.batches), self.device, self.nets.channels_last)
            return self._train(x, y, cached, self.config)

    def _train(self, x: Tensor, y: Tensor, cached: Any, c: Config) -> dict[str, Tensor]:
        shape = (len(x), *self.nets.vae.latent_shape(c.data.resolution))
        self.next += 1
        draws = self.draws(shape, step=self.next)
        return self.train_step(self.nets, x, y, draws, c, self.next, cached)

    def flops_per_image(self) -> float:
        """Counted in a step of few images; what is recomputed to save memory counts again."""
        rows = [row[:COUNTED_IMAGES] for row in next(self.batches)]
        batch = to_device(rows, self.device, self.nets.channels_last)
        one = replace(self.config, run=replace(self.config.run, accumulation=1))
        return machine.count_flops(lambda: self._train(*batch, one)) / len(rows[0])

    def trace(self, path: Path | None) -> None:
        """Steps under torch's profiler; with a `path`, what it saw, in Chrome's format."""
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with profile(activities=activities) as profiler:
            profiler.add_metadata("program", PROGRAM)
            for _ in range(TRACED_STEPS):
                self.step(PhaseClock(self.device))
            machine.synchronize(self.device)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}{DRAFT}")
            profiler.export_chrome_trace(str(draft))
            draft.replace(path)


def open_made_up(c: Config) -> tuple[Source, Source]:
    """Noise with the classes of the config; `UserError` if it trains on cached latents."""
    if c.data.latents is not None:
        raise UserError(
            f"data.latents={c.data.latents}: cached latents are not made up; give --data to read "
            "them, or data.latents=null to run the VAE"
        )
    source = open_source("synthetic", None, c.data.resolution)
    if c.data.num_classes:
        source.classes = [str(label) for label in range(c.data.num_classes)]
    return source, source


def open_real(c: Config) -> tuple[Source, Source]:
    """The images of the config, and these with their cached latents, if there are any."""
    images = open_training_data(c)
    return images, join_cache(c, images)


def measure_training(
    config: Config,
    accelerator: Accelerator,
    train_step: Callable,
    steps: int,
    warmup: int,
    real_data: bool = False,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Time `steps` steps of training after `warmup` others, on every rank. The result, for JSON, is
    that of this rank, but images per second are those of the slowest. `trace`: `Training.trace`."""
    run, device, ranks = config.run, accelerator.device, Ranks()
    training = Training(config, accelerator, train_step, real_data)
    precision = training.nets.precision
    peaks = machine.matmul_peak(device, {precision, "fp32"}, run.tf32)
    flops = training.flops_per_image()
    for _ in range(warmup):
        training.step(PhaseClock(device))
    machine.synchronize(device)
    machine.forget_peak(device)
    clock = PhaseClock(device)
    for _ in range(steps):
        training.step(clock)
    times = clock.read()
    memory = machine.peak_memory(device)
    if trace:
        training.trace(trace if ranks.is_main else None)
    step = spread([sum(phases.values()) for phases in times])
    # ranks wait for each other in every step: the slowest sets the pace
    slowest = ranks.gather(torch.tensor([step["median"]], device=device)).max().item()
    rate = 1000 * training.rank_batch / slowest
    achieved = flops * rate / 1e12
    return {
        "mode": "training",
        "data": config.data.source if real_data else "made up",
        "ranks": ranks.world,
        "images_per_step": run.batch_size,
        "steps": steps,
        "warmup_steps": warmup,
        "images_per_second": rate,
        "images_per_second_all_ranks": rate * ranks.world,
        "step_ms": step,
        **memory,
        "gflop_per_image": flops / 1e9,
        "achieved_tflops": achieved,
        "matmul_tflops": peaks,
        "precision": precision,
        "share_of_matmul_peak": achieved / peaks[precision],
        "phases": phase_medians(times, training.rank_batch),
    }
