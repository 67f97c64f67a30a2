"""Checks of this machine: package versions, GPUs and their precision, cores and shared memory."""

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from models.weights.loading import count
from utils.config.schema import Config
from utils.cost.fake_run import cached_rows
from utils.data.sampling import PREFETCH
from utils.doctor.findings import Finding, check, fail, ok, warn
from utils.files import format_bytes
from utils.precision import emulation_note
from utils.training.networks import Networks

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"
TOO_BIG_FOR_CPU = 10**8  # parameters of a SiT


@check("packages")
def check_packages(c: Config) -> Iterator[Finding]:
    """Installed versions are at least those of requirements.txt."""
    if old := outdated_packages():
        yield warn(f"the tests passed with {', '.join(old)}: run pip install -r requirements.txt")
    names = ("torch", "torchvision", "diffusers", "timm", "accelerate", *c.run.trackers)
    yield ok(", ".join(f"{name} {installed(name)}" for name in names))


def outdated_packages() -> list[str]:
    """What is missing of requirements.txt or older than its lower bound, with the version here."""
    found = []
    for line in REQUIREMENTS.read_text().splitlines():
        if text := line.split("#")[0].strip():
            bound = Requirement(text)
            have = installed(bound.name)
            if not (have and bound.specifier.contains(have)):
                found.append(f"{bound} (here: {have or 'none'})")
    return found


def installed(name: str) -> str | None:
    """Version of a package, without the build's suffix; None if it is not installed."""
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None


@check("device")
def check_device(c: Config, ranks: int, nets: Networks | None) -> Iterator[Finding]:
    """There is a GPU for each rank, and it knows the precision."""
    gpus = gpu_names()
    if not gpus:
        threads = torch.get_num_threads()
        text = f"no GPU here: the run takes {cpu_cores()} CPU cores, {threads} thread(s) a rank"
        if note := emulation_note(c.run.precision, "cpu"):
            text += f"; run.precision={c.run.precision}: {note}"
        big = nets and count(nets.sit) > TOO_BIG_FOR_CPU
        yield warn(f"{text}, too slow for this SiT") if big else ok(text)
        return
    if c.run.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield warn(f"{gpus[0]} has no bf16: set run.precision=fp16")
    if ranks > len(gpus):
        yield warn(f"{ranks} ranks for {len(gpus)} GPU(s): right only if there are more machines")
    yield ok(f"{len(gpus)} x {gpus[0]}")


@check("workers")
def check_workers(c: Config, ranks: int, nets: Networks | None) -> Iterator[Finding]:
    """Cores and shared memory suffice for the loader processes of this machine's ranks."""
    here = min(ranks, len(gpu_names()) or ranks)
    workers, cores = here * c.data.workers, cpu_cores()
    if not workers:
        yield ok("images are read in the training process (data.workers=0)")
        return
    cached = cached_rows(nets, c, 1) if nets else []
    example = 3 * c.data.resolution**2 + sum(rows.nbytes for rows in cached)
    batch = example * max(1, c.run.batch_size // ranks)
    need, free = workers * PREFETCH * batch, free_shared_memory()
    text = f"{here} rank(s) x data.workers={c.data.workers}, {format_bytes(need)} of batches ahead"
    if free is not None and need > free:
        fits = free // (here * PREFETCH * batch)
        advice = f"enlarge it (docker run --shm-size=...), or set data.workers={fits}"
        yield fail(f"{text}, but {format_bytes(free)} are free in /dev/shm: {advice}")
    elif workers > cores:
        yield warn(f"{text}, on {cores} CPU cores: set data.workers={max(1, cores // here)}")
    else:
        ram = format_bytes(psutil.virtual_memory().available)
        yield ok(f"{text}; {cores} CPU cores, {ram} RAM free")


def gpu_names() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def gpu_memory() -> int | None:
    """Free bytes of the visible GPU that has the least; None without a GPU."""
    free = (torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    return min(free, default=None)


def cpu_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_shared_memory() -> int | None:
    """Bytes in which loader workers can hand batches over; None where there is no /dev/shm."""
    place = Path("/dev/shm")
    return shutil.disk_usage(place).free if place.is_dir() else None
