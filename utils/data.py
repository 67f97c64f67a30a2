"""Which images make a batch, and the loader that brings them.

The images of global step k are a function of (seed, k) alone: nothing has to be saved to resume,
and ranks and workers can change without changing a batch. The sources: `utils.sources`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler, default_collate

from models.errors import UserError
from utils.sources import DigitsSource, FolderSource, Hdf5Source, PackedSource, SyntheticSource

PREFETCH = 4  # batches that each worker holds ready
SOURCES = ("digits", "folder", "packed", "hdf5", "synthetic")


class Source(Protocol):
    """What the rest of the code knows of a data set."""

    num_classes: int
    resolution: int

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        """Image i: (3, resolution, resolution) uint8, and its label in 0 .. num_classes - 1."""

    def key(self, i: int) -> str:
        """Stable name of image i; cached latents are joined to images by it."""


def open_source(
    name: str, path: str | Path | None = None, resolution: int = 256, split: str = "all"
) -> Source:
    """Open a data set. `path` is ignored by digits and synthetic; only digits has a `split`."""
    if name not in SOURCES:
        raise UserError(f"data.source={name!r}: expected one of {', '.join(SOURCES)}")
    if name == "digits":
        return DigitsSource(resolution, split)
    if split != "all":
        raise UserError(f"split {split!r}: only digits is split; give {name} another data.path")
    if name == "synthetic":
        return SyntheticSource(resolution)
    if path is None:
        raise UserError(f"data.source={name} needs data.path, the folder of the images")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"data.path={path}: no such folder (data.source={name}); correct the path")
    return {"folder": FolderSource, "packed": PackedSource, "hdf5": Hdf5Source}[name](
        root, resolution
    )


def step_indices(num_images: int, global_batch: int, seed: int, step: int) -> np.ndarray:
    """(global_batch,) int64: the images of one step, whatever the number of ranks.

    Each epoch is a permutation of its own; its last num_images % global_batch images are left out.
    """
    _check_batch(num_images, global_batch, 1)
    epoch, i = divmod(step, num_images // global_batch)
    return _permutation(num_images, seed, epoch)[i * global_batch : (i + 1) * global_batch]


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


class StepSampler(Sampler[list[int]]):
    """Batch sampler: this rank's contiguous share of every step in [start_step, end_step)."""

    def __init__(
        self,
        num_images: int,
        global_batch: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        end_step: int,
    ) -> None:
        assert 0 <= rank < world and start_step >= 0, (rank, world, start_step)
        _check_batch(num_images, global_batch, world)
        self.num_images, self.global_batch, self.seed = num_images, global_batch, seed
        self.steps = range(start_step, end_step)
        self.local_batch = global_batch // world
        self.offset = rank * self.local_batch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        current = None
        for step in self.steps:
            epoch, i = divmod(step, self.num_images // self.global_batch)
            if epoch != current:
                order, current = _permutation(self.num_images, self.seed, epoch), epoch
            start = i * self.global_batch + self.offset
            yield order[start : start + self.local_batch].tolist()


class Loader(DataLoader):
    """A DataLoader whose workers hand a `UserError` over as it is, not wrapped in a traceback."""

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch


class _Batches(torch.utils.data.Dataset):
    """A source read batch by batch."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> list | UserError:
        try:
            return default_collate([self.source[i] for i in indices])
        except UserError as error:
            return error


def _as_it_is(batch):
    return batch


def make_loader(
    source: Source,
    sampler: StepSampler | list[list[int]],
    workers: int = 0,
    pin_memory: bool = False,
    context: str | None = None,
) -> Loader:
    """Yields [x_u8 (B, 3, H, W) uint8, y (B,) int64, and what else the source gives], one batch per
    step of `sampler`.

    `workers` processes of one thread each; 0 reads in this process. `context` is how they start
    ("fork", "spawn"; None: Python's default). No random number is drawn, here or in a worker.
    """
    parallel = {}
    if workers:
        parallel = {"persistent_workers": True, "prefetch_factor": PREFETCH}
        parallel["multiprocessing_context"] = context
    return Loader(
        _Batches(source),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # else the loader draws from the global one for its workers
        **parallel,
    )
