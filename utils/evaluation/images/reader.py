"""Reads images ahead, in threads: what reaches the main thread is ready to be computed with.

A thread reads a block of images, hashes them, brings them to the size that the network takes, and
copies them into memory that a GPU reads by itself. The main thread only takes blocks, in order.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import numpy as np
import torch

from utils.evaluation.images.npz_images import ImageSet

# batches that a GPU has not finished
MOST_QUEUED = 4
# (n, H, W, 3) uint8 => (n, H', W', 3) uint8: what a network wants done to images on the host
Prepare = Callable[[np.ndarray], np.ndarray]


def read_ahead(
    images: ImageSet, blocks: Iterable[tuple[int, int]], *, workers: int = 1,
    device: torch.device | None = None, prepare: Prepare | None = None,
) -> Generator[torch.Tensor]:  # fmt: skip
    """(n, 3, H, W) uint8 for each (start, stop), in order, in memory that can be uploaded to
    `device` while the host goes on. Each of `workers` threads reads a block of its own; so many
    blocks are in memory, beside the one in use. Numpy, Pillow and zlib work outside the interpreter
    lock. An error of a thread is raised in the place of its block. The threads end with the
    iteration; when that ends early, each may have to finish the block that it is reading.
    """
    ended = Event()

    def read(start: int, stop: int) -> torch.Tensor | None:
        if ended.is_set():
            return None
        block = images.read(start, stop)
        images.note(start, block)
        if prepare:
            return _to_tensor(prepare(block), False, device)
        return _to_tensor(block, images.planes, device)

    workers = workers if images.parallel else 1
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="reader") as pool:
        try:
            for block in blocks:
                pending.append(pool.submit(read, *block))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            ended.set()


def _to_tensor(block: np.ndarray, planes: bool, device: torch.device | None) -> torch.Tensor:
    """A copy of images (n, H, W, 3) as (n, 3, H, W), in channels-last memory for a GPU."""
    x_u8 = host_memory(block.shape, torch.uint8, device)
    np.copyto(x_u8.numpy(), block)
    x_u8 = x_u8.permute(0, 3, 1, 2)
    return x_u8.contiguous() if planes and not x_u8.is_pinned() else x_u8


def host_memory(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None
) -> torch.Tensor:
    """Memory of the host that `device` reads and writes while the host goes on."""
    return torch.empty(shape, dtype=dtype, pin_memory=_is_gpu(device))


def upload(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on `device`; the host does not wait until it is there."""
    pinned = x.pin_memory() if _is_gpu(device) and not x.is_cuda else x
    return pinned.to(device, non_blocking=True)


class Queue:
    """Keeps the host at most `MOST_QUEUED` batches ahead of a GPU: each holds memory."""

    def __init__(self, device: torch.device):
        self.device, self.batches = device, deque[torch.cuda.Event]()

    def add(self) -> None:
        """All that a batch needs is in the GPU's queue."""
        if not _is_gpu(self.device):
            return
        self.batches.append(torch.cuda.Event(blocking=True))
        self.batches[-1].record(torch.cuda.current_stream(self.device))
        if len(self.batches) > MOST_QUEUED:
            self.batches.popleft().synchronize()


def _is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda" and torch.cuda.is_available()
