"""Check of GPU memory: what one rank needs, and the settings with which a step fits."""

from collections.abc import Callable, Iterator

from utils.config.schema import Config
from utils.cost.memory import RESERVE, Estimate
from utils.cost.settings import Estimates, Settings
from utils.doctor.findings import Finding, check, fail, ok, warn
from utils.files import format_bytes
from utils.training.networks import Networks

TIGHT = 0.9  # of the memory that is there


@check("memory")
def check_memory(
    c: Config,
    nets: Networks | None,
    ranks: int,
    rank_batch: int | None,
    free: int | None,
    train_step: Callable,
) -> Iterator[Finding]:
    """GPU memory of one of `ranks` ranks in bytes against `free`, and what would make it enough.
    Uses up `nets`, the networks on the meta device."""
    if nets is None or rank_batch is None:
        return
    k, estimates = c.run.accumulation, Estimates(c, nets, train_step, ranks)
    found = estimates.of(c.run.checkpointing)
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
