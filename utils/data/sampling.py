"""Which images make a batch, and the loader that reads them.

The images of global step k are a function of (seed, k) alone: nothing has to be saved to resume,
and the number of ranks and workers can change without changing a batch.
"""

import atexit
import math
import multiprocessing
import signal
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from models.checks.errors import UserError
from utils.data.base import Allocator, BadImages, Source
from utils.process.signals import SIGNALS

PREFETCH = 4  # batches that each worker holds ready


def step_indices(num_images: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """(global_batch,) int64: the images of one step, whatever the number of ranks. `UserError` for
    an impossible batch or a negative seed.

    Each epoch is a permutation of its own; its last num_images % global_batch images are left out.
    """
    _check_batch(num_images, global_batch, 1)
    epoch, i = divmod(step, num_images // global_batch)
    return _permutation(num_images, seed, epoch)[i * global_batch : (i + 1) * global_batch]


@lru_cache(maxsize=1)
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    # Raw draws, sorted: numpy keeps these streams for ever, its shuffles may change with a release.
    if seed < 0:
        raise UserError(f"seed {seed}: expected 0 or more")
    draws = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_images)
    return draws.argsort(kind="stable")


def _check_batch(num_images: int, global_batch: int, world: int) -> None:
    if not 1 <= global_batch <= num_images:
        text = f"global batch {global_batch}: expected 1 .. {num_images}, the number of images"
        raise UserError(f"{text}; change the batch size or give more images")
    if global_batch % world:
        text = f"global batch {global_batch} cannot be shared equally by {world} ranks"
        raise UserError(f"{text}; make it a multiple of {world} or change the number of ranks")


@dataclass
class StepSampler(Sampler[list[int]]):
    """Batch sampler: this rank's contiguous share of every step in [start_step, end_step) that is
    not in `left_out`."""

    num_images: int
    global_batch: int
    _: KW_ONLY
    seed: int
    rank: int = 0
    world: int = 1
    start_step: int = 0
    end_step: int
    left_out: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world and self.start_step >= 0, self
        _check_batch(self.num_images, self.global_batch, self.world)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def steps(self) -> Sequence[int]:
        """The steps of which there is a batch."""
        steps = range(self.start_step, self.end_step)
        return [step for step in steps if step not in self.left_out] if self.left_out else steps

    def __iter__(self) -> Iterator[list[int]]:
        share = self.global_batch // self.world
        for step in self.steps:
            indices = step_indices(self.num_images, self.global_batch, self.seed, step)
            yield indices[self.rank * share : (self.rank + 1) * share].tolist()


class Loader(DataLoader):
    """A DataLoader that raises a `UserError` of a worker as it is, not wrapped in a traceback, and
    notes the images that no worker could read in `bad`, if that is set: see `Source.read`. Its
    workers leave signals to this process."""

    bad: BadImages | None = None

    @property
    def error(self) -> UserError | None:
        """What to stop with, once what is read is saved: too many images could not be read."""
        return self.bad.error if self.bad else None

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        before = multiprocessing.active_children()
        with signals_blocked():
            batches = super().__iter__()
        _workers.update(set(multiprocessing.active_children()).difference(before))
        for batch in batches:
            if isinstance(batch[0], UserError):
                raise batch[0]
            *batch, found = batch
            if self.bad is not None:
                self.bad.add(found)
            yield batch


_workers = weakref.WeakSet()  # the processes of all loaders


@atexit.register  # hence before Python waits for the processes that it has told to end by SIGTERM
def end_workers() -> None:
    """Workers ignore that signal. One may be left where an exception still holds its loader."""
    if _workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler reports killed workers
    for worker in _workers:
        worker.kill()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started inside inherit that SIGTERM, SIGINT and SIGUSR1 do not reach them; this one
    takes such a signal afterwards. A signal to the whole process group would otherwise kill a
    worker before it can ignore it, and with it the run that is about to save."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # it would unblock two of them
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int) -> None:
    """In a loader's worker: it ends when the process that started it tells it to, or dies."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class _Batches(Dataset):
    """A source read batch by batch; the last item of a batch are the images that could not be read,
    with the reasons."""

    def __init__(self, source: Source, pinned: bool) -> None:
        self.source, self.pinned = source, pinned

    def __getitems__(self, indices: list[int]) -> list:
        try:
            batch, unreadable = self.source.read_batch(indices, self._allocator())
        except UserError as error:
            return [error]
        return [*batch, unreadable]

    def _allocator(self) -> Allocator:
        """Memory in which a batch reaches the step without being copied: of a worker, what it
        shares with the training process; of that process itself, what the GPU reads (pinned)."""
        if get_worker_info() is not None:
            return shared_empty
        return partial(torch.empty, pin_memory=True) if self.pinned else torch.empty


def shared_empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Like `torch.empty`, in memory that the queue to another process does not copy."""
    new_shared = getattr(torch.UntypedStorage, "_new_shared", None)
    if new_shared is None:  # no public name: without it, the queue copies the batch once
        return torch.empty(shape, dtype=dtype)
    storage = new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def make_loader(
    source: Source,
    sampler: StepSampler | list[list[int]],
    workers: int = 0,
    pin_memory: bool = False,
    context: str | None = None,
) -> Loader:
    """Yields one batch for each step of `sampler`: [x_u8 (B, 3, H, W) uint8 in channels-last
    memory, y (B,) int64, what else the source gives]. A `UserError` in a worker is raised here;
    images that are replaced are noted in `source.bad`.

    `workers` processes of one thread each; 0 reads in this process. `context` is how they start
    ("fork", "spawn"; None: Python's default). No random number is drawn, here or in a worker.
    """
    loader = Loader(
        _Batches(source, pin_memory and torch.cuda.is_available()),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=list,  # batches are collated already
        generator=torch.Generator(),  # else the loader draws from the global one for its workers
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context=context if workers else None,
        worker_init_fn=ignore_signals,
    )
    loader.bad = source.bad
    return loader
