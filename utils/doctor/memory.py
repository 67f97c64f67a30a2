"""Checks of what a step needs: memory of one rank and the settings with which it fits, and time on
the CPU of this machine."""

from collections.abc import Callable, Iterator

import psutil
import torch

from utils.benchmark.machine import matmul_peak
from utils.config.schema import Config
from utils.cost.fake_cuda import too_old
from utils.cost.memory import RESERVE, Estimate
from utils.cost.settings import Estimates, Settings, extrapolated
from utils.doctor.findings import Finding, check, fail, ok, warn
from utils.doctor.machine import gpu_names
from utils.files import format_bytes
from utils.training.networks import Networks

TIGHT = 0.9  # of the memory that is there
PROGRAM = 2**30  # bytes of Python and its libraries on the CPU
# Of the rate of large matrix products, what a step is taken to reach.
CPU_SHARE = 0.5


@check("memory")
def check_memory(
    c: Config,
    nets: Networks | None,
    ranks: int,
    rank_batch: int | None,
    free: int | None,
    train_step: Callable,
) -> Iterator[Finding]:
    """GPU memory of one of `ranks` ranks in bytes against `free`, and what would make it enough;
    without a GPU, memory and time of a run on this CPU. Uses up `nets`, the networks on the meta
    device."""
    if nets is None or rank_batch is None:
        return
    if reason := too_old():
        yield warn(reason)
        return
    k, estimates = c.run.accumulation, Estimates(c, nets, train_step, ranks)
    found = estimates.of(c.run.checkpointing)
    if free is None and not gpu_names():
        yield memory_on_cpu(found, rank_batch, k, ranks)
        yield time_on_cpu(c, found, rank_batch, ranks)
        return
    need, resident = found.peak(rank_batch, k) + RESERVE, sum(found.resident.values())
    work = format_bytes(need - RESERVE - resident)
    text = (
        f"about {format_bytes(need)} a GPU, predicted: {format_bytes(resident)} weights, EMA, "
        f"gradients and Adam, {work} for {rank_batch // k} images at a time, "
        f"{format_bytes(RESERVE)} set aside"
    )
    if free is None:
        yield ok(text + accumulation_options(found, rank_batch, k))
        return
    text += f", of {format_bytes(free)}"
    if need > free:
        yield fail(f"{text}: {remedy(estimates, rank_batch, free)}")
    elif need > TIGHT * free:
        yield warn(f"{text}, which is tight{accumulation_options(found, rank_batch, k)}")
    else:
        yield ok(text)


def memory_on_cpu(found: Estimate, rank_batch: int, k: int, ranks: int) -> Finding:
    """What all ranks need of the memory of this machine."""
    need, free = found.peak(rank_batch, k) + PROGRAM, psutil.virtual_memory().available
    text = f"about {format_bytes(ranks * need)} of RAM, predicted; {format_bytes(free)} are free"
    if ranks * need <= free:
        return ok(text)
    return warn(f"{text}: lower run.batch_size={rank_batch * ranks}, or raise run.accumulation={k}")


def time_on_cpu(c: Config, found: Estimate, rank_batch: int, ranks: int) -> Finding:
    """How long a step takes here, roughly: its operations at the rate that products of matrices
    reach just now."""
    rate = CPU_SHARE * matmul_peak(torch.device("cpu"), {"fp32"}, c.run.tf32)["fp32"] * 1e12
    micro = rank_batch // c.run.accumulation
    operations = c.run.accumulation * sum(e.op.flops for e in extrapolated(found, micro))
    step = ranks * operations / rate
    text = f"roughly {step:.2g} s a step on this CPU as busy as it is now"
    return ok(f"{text}, {in_words(c.run.steps * step)} for {c.run.steps:,} steps", "time")


def in_words(seconds: float) -> str:
    """A length of time, e.g. 12 minutes."""
    sizes = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
    unit = next((name for name, size in sizes.items() if seconds < 100 * size), "days")
    return f"{seconds / sizes[unit]:,.2g} {unit}"


def accumulation_options(found: Estimate, rank_batch: int, k: int) -> str:
    """The memory with two and four times as many micro-batches, where that saves a tenth."""
    splits = (n for n in (k, 2 * k, 4 * k) if rank_batch % n == 0)
    sizes = {n: found.peak(rank_batch, n) + RESERVE for n in splits}
    worth = [n for n in sizes if sizes[n] < 0.9 * sizes[k]]
    return "".join(f"; with run.accumulation={n} {format_bytes(sizes[n])}" for n in worth)


def remedy(estimates: Estimates, rank_batch: int, free: int) -> str:
    """The cheapest settings with which a step fits into `free` bytes, tried out on estimates."""
    if best := estimates.cheapest(rank_batch, free):
        return f"set {changes(best, estimates.config)} ({format_bytes(best.need)})"
    least = min(estimates.of(kind).peak(rank_batch, rank_batch) for kind in estimates.kinds())
    return (
        f"even one image at a time with checkpointing needs {format_bytes(least + RESERVE)}: "
        "take a smaller sit.size"
    )


def changes(best: Settings, c: Config) -> str:
    """Those of the settings that the config does not have."""
    have = (f"run.checkpointing={c.run.checkpointing}", f"run.accumulation={c.run.accumulation}")
    return " ".join(setting for setting in str(best).split() if setting not in have)
