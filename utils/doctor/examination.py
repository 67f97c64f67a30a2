"""All checks of the doctor, in their order, and what one check hands to a later one."""

from collections.abc import Callable, Iterator

from utils.config.schema import Config
from utils.doctor import data, machine, memory, run_folder, shapes, weights
from utils.doctor.findings import Finding


def examine(
    c: Config, ranks: int, gpu_memory: int | None, published: bool, train_step: Callable
) -> Iterator[Finding]:
    """The findings of every check, whatever the others find.

    gpu_memory: bytes of one GPU; None = unknown. published: whether this repeats one of the paper's
    runs. train_step: that of train_repae.py, whose memory is estimated.
    """
    yield from machine.check_packages(c)
    source = yield from data.check_source(c)
    yield from data.check_latents(c, source)
    yield from data.check_images(source)
    rank_batch = yield from shapes.check_batch(c, ranks, source, published)
    yield from shapes.check_ema(c)
    found = yield from run_folder.check_resume(c, source)
    nets = yield from shapes.check_tokens(c, source, found)
    yield from machine.check_device(c, ranks, nets)
    yield from machine.check_workers(c, ranks, nets)
    yield from weights.check_weights(c, source, found)
    yield from run_folder.check_disk(c, nets)
    # last: the estimate turns `nets` into fake tensors
    yield from memory.check_memory(c, nets, ranks, rank_batch, gpu_memory, train_step)
