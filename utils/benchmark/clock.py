"""The time of each phase of a step, read off after the last step: nothing waits inside a step.

On a GPU a boundary between phases is a CUDA event in the stream, so that a time is one of the
device: from the end of the work queued before the phase to the end of the phase's own, gaps in
which the device waits for the host included. On the CPU it is a reading of the wall clock.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median, quantiles

import torch

from utils.training.phases import PHASES

# beside the phases of utils/training/phases.py: until a batch is on the device, and the rest
DATA, OTHER = "data", "other"


class PhaseClock:
    """An observer of the phases of a step (utils/training/phases.py), and its own for DATA.

    What a phase holds does not count what another one inside it holds.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self._inside: list[str] = []
        # of each step: its boundaries, each with the phase that begins there; then its end
        self._steps: list[list[tuple]] = []

    def begin(self, name: str) -> None:
        self._inside.append(name)
        self._mark()

    def end(self, name: str) -> None:
        assert self._inside.pop() == name
        self._mark()

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is called inside is one step."""
        self._steps.append([])
        self._mark()
        yield
        self._mark()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        self.begin(DATA)
        yield
        self.end(DATA)

    def _mark(self) -> None:
        now = time.perf_counter()
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._steps[-1].append((self._inside[-1] if self._inside else OTHER, now))

    def read(self) -> list[dict[str, float]]:
        """Milliseconds of each phase in each step; they add up to the step. Waits for the
        device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return [self._times(marks) for marks in self._steps]

    def _times(self, marks: list[tuple]) -> dict[str, float]:
        times: dict[str, float] = {}
        for (name, start), (_, stop) in pairwise(marks):
            ms = start.elapsed_time(stop) if self.on_gpu else 1000 * (stop - start)
            times[name] = times.get(name, 0.0) + ms
        return times


def spread(values: list[float]) -> dict[str, float]:
    """Median of measured values, and between what 80 % of them lie."""
    low, *_, high = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 2
    return {"median": median(values), "low": low, "high": high}


def phase_medians(steps: list[dict[str, float]], images: int) -> dict[str, dict[str, float]]:
    """{phase: {"ms", "ms_per_image", "share"}} of steps of so many images, as `PhaseClock.read`
    gives them: the median over steps, and its part of the sum of all medians."""
    found = {name for step in steps for name in step}
    names = [name for name in (DATA, *PHASES, OTHER) if name in found]
    medians = {name: median(step.get(name, 0.0) for step in steps) for name in names}
    total = sum(medians.values()) or 1.0
    return {
        name: {"ms": ms, "ms_per_image": ms / images, "share": ms / total}
        for name, ms in medians.items()
    }
