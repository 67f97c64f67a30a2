"""Check of GPU memory: what one rank needs, and the settings with which a step fits."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from utils.config.schema import Config
from utils.doctor.findings import Finding, check, fail, ok, warn
from utils.files import format_bytes
from utils.training.cost import RESERVE, Estimate, estimate
from utils.training.networks import Networks, skeleton

TIGHT = 0.9  # of the memory that is there


@check("memory")
def check_memory(
    c: Config, nets: Networks | None, rank_batch: int | None, free: int | None, train_step: Callable
) -> Iterator[Finding]:
    """GPU memory of one rank in bytes against `free`, and what would make it enough. Uses up
    `nets`, the networks on the meta device."""
    if nets is None or rank_batch is None:
        return
    k, classes = c.run.accumulation, nets.sit.config.num_classes
    found = estimate(c, nets, train_step)
    need, resident = found.peak(rank_batch, k) + RESERVE, sum(found.resident.values())
    work = format_bytes(need - RESERVE - resident)
    text = (
        f"about {format_bytes(need)} a GPU: {format_bytes(resident)} weights, EMA, gradients and "
        f"Adam, {work} for {rank_batch // k} images at a time, {format_bytes(RESERVE)} set aside"
    )
    if free is None:
        yield ok(text + accumulation_options(found, rank_batch, k))
        return
    text += f"; {format_bytes(free)} are free"
    if need > free:
        yield fail(f"{text}: {remedy(c, found, classes, rank_batch, free, train_step)}")
    elif need > TIGHT * free:
        yield warn(f"{text}, which is tight{accumulation_options(found, rank_batch, k)}")
    else:
        yield ok(text)


def accumulation_options(found: Estimate, rank_batch: int, k: int) -> str:
    """The memory with two and four times as many micro-batches, where that saves a tenth."""
    splits = (n for n in (k, 2 * k, 4 * k) if rank_batch % n == 0)
    sizes = {n: found.peak(rank_batch, n) + RESERVE for n in splits}
    worth = [n for n in sizes if sizes[n] < 0.9 * sizes[k]]
    return "".join(f"; with run.accumulation={n} {format_bytes(sizes[n])}" for n in worth)


def remedy(
    c: Config, found: Estimate, num_classes: int, rank_batch: int, free: int, train_step: Callable
) -> str:
    """Settings with which a step fits into `free` bytes, tried out on the estimate."""
    if k := found.accumulation_that_fits(rank_batch, free):
        return f"set run.accumulation={k} ({format_bytes(found.peak(rank_batch, k) + RESERVE)})"
    thrifty = replace(c, run=replace(c.run, checkpointing="both"))
    less = estimate(thrifty, skeleton(thrifty, num_classes), train_step)
    if k := less.accumulation_that_fits(rank_batch, free):
        size = format_bytes(less.peak(rank_batch, k) + RESERVE)
        return f"set run.checkpointing=both run.accumulation={k} ({size})"
    least = format_bytes(less.peak(rank_batch, rank_batch) + RESERVE)
    return f"even one image at a time with checkpointing needs {least}: take a smaller sit.size"
