"""Images per second that the data loader gives, and the processor time that an image takes."""

import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import psutil
from accelerate import Accelerator

from utils.benchmark.clock import spread
from utils.benchmark.machine import total
from utils.benchmark.training import ENDLESS, open_real
from utils.config.schema import Config, per_rank_batch
from utils.data.sampling import PREFETCH
from utils.data.training import open_loader
from utils.distributed import Ranks


def processor_seconds() -> float:
    """Of this process and of those that it has started and that are still there."""
    me = psutil.Process()
    processes = [me, *me.children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure_loading(
    config: Config, accelerator: Accelerator, steps: int, warmup: int
) -> dict[str, Any]:
    """Time `steps` batches of the config's loader, on every rank at once, with nobody else at work.
    `warmup` others come before, and those that the workers have ready by then."""
    ranks, c = Ranks(), replace(config, run=replace(config.run, steps=ENDLESS))
    size = per_rank_batch(c, ranks.world)
    batches = iter(open_loader(c, open_real(c)[1], accelerator, first=0))
    for _ in range(warmup + c.data.workers * PREFETCH):
        next(batches)
    ranks.wait()
    cpu, marks = processor_seconds(), [time.perf_counter()]
    for _ in range(steps):
        next(batches)
        marks.append(time.perf_counter())
    cpu, seconds = processor_seconds() - cpu, marks[-1] - marks[0]
    # workers hand over in bursts: a median of batches would not be the rate
    rate = steps * size / seconds
    return {
        "mode": "data",
        "data": c.data.source,
        "ranks": ranks.world,
        "images_per_step": c.run.batch_size,
        "workers_per_rank": c.data.workers,
        "steps": steps,
        "warmup_steps": warmup,
        "images_per_second": rate,
        "images_per_second_all_ranks": total(ranks, rate),
        "batch_ms": spread([1000 * (b - a) for a, b in pairwise(marks)]),
        "processor_seconds_per_image": cpu / (steps * size),
    }
