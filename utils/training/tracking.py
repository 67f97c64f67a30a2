"""Metrics of a run: summed on the device, reduced over ranks and read once every so many steps.

`metrics.jsonl` is always written; tensorboard or wandb get the same numbers through accelerate.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from utils.config.load import CONFIG_FILE, flat, to_yaml
from utils.config.schema import Config
from utils.files import write_atomically, write_json
from utils.training.networks import Networks

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteError(RuntimeError):
    """A loss stopped being a number: the message names the term and the first such step."""


class Tracker:
    """Sums the metrics of each step and writes their means; `add` costs no host synchronisation,
    `flush` costs one.

    A value that is not finite, of a metric whose name starts with one of `guarded`, stops the run:
    losses always; gradient norms too, unless a loss scale (fp16) is there to skip such steps.
    `status()` gives figures of the moment (learning rates, memory) for every line of metrics.jsonl.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        batch_size: int,
        guarded: tuple[str, ...] = ("loss/", "grad_norm/"),
        status: Callable[[], dict[str, float]] = dict,
    ):
        self.accelerator, self.path = accelerator, run_dir / "metrics.jsonl"
        self.batch_size, self.guarded, self.status = batch_size, guarded, status
        self._clear()

    def _clear(self) -> None:
        self.names, self.sums, self.bad_step, self.count = None, None, None, 0
        self.since, self.waited = time.perf_counter(), 0.0

    def timed(self, batches: Iterable) -> Iterator:
        """The batches of a loader; the seconds until each comes are counted as waiting for data."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before
            yield batch

    @torch.no_grad()
    def add(self, metrics: dict[str, torch.Tensor], step: int) -> None:
        """Scalars of one step (0-based), the same names at every step between two flushes."""
        if self.names is not None and list(metrics) != self.names:
            self.flush(step)
        values = torch.stack([m.detach().float().reshape(()) for m in metrics.values()])
        if self.names is None:
            self.names, self.sums = list(metrics), torch.zeros_like(values, dtype=torch.float64)
            self.bad_step = torch.full_like(values, float("inf"), dtype=torch.float64)
        self.sums += values
        here = torch.where(values.isfinite(), float("inf"), float(step))
        self.bad_step = torch.minimum(self.bad_step, here.double())
        self.count += 1

    def flush(self, step: int) -> dict[str, float]:
        """Write means over ranks and over the steps since the last flush, and the `status`; `step`
        steps are done. Raises `NonFiniteError` on every rank if a guarded metric of any rank was
        not finite."""
        if not self.count:
            return {}
        means, bad = self._reduce()
        self._check(bad)
        row = dict(zip(self.names, means))
        seconds = time.perf_counter() - self.since
        row["images_per_second"] = self.count * self.batch_size / seconds
        row["seconds_waiting_for_data"] = self.waited / self.count
        row |= self.status()
        self.write(step, row)
        self._clear()
        return row

    def restart_clock(self) -> None:
        """Leave what was done since the last flush (pictures, checkpoints) out of images/s."""
        if not self.count:
            self.since, self.waited = time.perf_counter(), 0.0

    def _reduce(self) -> tuple[list[float], list[float]]:
        packed = torch.stack([self.sums / self.count, self.bad_step])
        every = self.accelerator.gather(packed[None])  # (ranks, 2, terms)
        return torch.stack([every[:, 0].mean(dim=0), every[:, 1].amin(dim=0)]).tolist()

    def _check(self, bad: list[float]) -> None:
        watched = [(b, n) for b, n in zip(bad, self.names) if n.startswith(self.guarded)]
        first, term = min(watched, key=lambda pair: pair[0], default=(math.inf, None))
        if first < math.inf:
            raise NonFiniteError(f"{term} is not finite at step {int(first)}")

    def write(self, step: int, row: dict[str, float]) -> None:
        """One line under `step` steps done, on the main process."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            # JSON has no infinity: the gradient norm of a step that fp16 skipped becomes null
            clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
            file.write(json.dumps({"step": step} | clean) + "\n")
        self.accelerator.log(row, step=step)

    def rewind(self, step: int) -> None:
        """Drop lines of steps after `step`: a resumed run will write them again."""
        if not (self.accelerator.is_main_process and self.path.is_file()):
            return
        text = self.path.read_text()
        kept = "".join(line + "\n" for line in text.splitlines() if _step_of(line) <= step)
        if kept != text:  # a line may also lack nothing but its end
            write_atomically(self.path, kept)


def _step_of(line: str) -> float:
    """Step of a metrics line; infinite for one that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """All whole lines of a metrics.jsonl."""
    lines = Path(path).read_text().splitlines()
    return [json.loads(line) for line in lines if _step_of(line) < float("inf")]


def start(
    config: Config,
    accelerator: Accelerator,
    first: int,
    nets: Networks,
    latent_stats: dict | None = None,
) -> Tracker:
    """Record the config (an earlier, different one is kept beside it) and the latent statistics
    that a new run starts with, and open the trackers."""
    guarded = ("loss/",) if config.run.precision == "fp16" else ("loss/", "grad_norm/")
    status = partial(training_status, nets, accelerator.device)
    tracker = Tracker(accelerator, config.run_dir, config.run.batch_size, guarded, status)
    if accelerator.is_main_process:
        _record(config, first)
        if latent_stats:
            write_json(config.run_dir / "latent_stats.json", latent_stats)
    tracker.rewind(first)
    if config.run.trackers:
        settings = {name: str(value) for name, value in flat(asdict(config)).items()}
        accelerator.init_trackers("repa-e", settings, {"wandb": {"name": config.run.name}})
    return tracker


def training_status(nets: Networks, device: torch.device) -> dict[str, float]:
    """Learning rate of each network (0: it does not move yet), loss scale of each under fp16, and
    on a GPU the peak memory in GiB since the last call."""
    status = {f"lr/{name}": trained.lr for name, trained in nets.trained.items()}
    for name, trained in nets.trained.items():
        if trained.scaler.is_enabled():
            status[f"loss_scale/{name}"] = trained.scaler.get_scale()
    if device.type == "cuda":
        status["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return status


def _record(config: Config, first: int) -> None:
    """Write config.yaml; one that differs is kept under the step it was good for."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    path, text = config.run_dir / CONFIG_FILE, to_yaml(config)
    if path.is_file() and path.read_text() != text:
        old = path.rename(path.with_name(f"config.{first:07d}.yaml"))
        print(f"the config has changed: the old one is kept as {old.name}")
    write_atomically(path, text)


def progress_bar(first: int, steps: int, accelerator: Accelerator) -> tqdm:
    """Steps, steps/s and the time left; rare updates where the output is a log file."""
    interval = 0.5 if sys.stderr.isatty() else 15
    hidden = not accelerator.is_main_process
    return tqdm(initial=first, total=steps, disable=hidden, mininterval=interval, unit="step")


def show(bar: tqdm, row: dict[str, float]) -> None:
    """Throughput and the SiT's losses beside the progress bar."""
    if not row:
        return
    short = {k.rsplit("/", 1)[1]: f"{v:.3f}" for k, v in row.items() if k.startswith("loss/sit/")}
    bar.set_postfix({"images/s": f"{row['images_per_second']:.1f}"} | short, refresh=False)
