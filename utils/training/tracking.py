"""Metrics of a run: summed on the device, reduced over ranks and read once every so many steps.

`metrics.jsonl` is always written; tensorboard and wandb get the same numbers, and the pictures.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from tqdm import tqdm

from models.checks.errors import UserError
from utils.checkpoint import UNUSED_CONFIG, Checkpoints, read_averages
from utils.config.load import CONFIG_FILE, to_yaml
from utils.config.schema import Config
from utils.files import append_json, read_json_lines, reason, sync, write_atomically, write_json
from utils.pictures.grid import save_picture
from utils.pictures.preview import later_pictures
from utils.process.ending import say
from utils.run_lock import RunLock
from utils.showing.trackers import Trackers
from utils.training.networks import Networks
from utils.training.nonfinite import NonFiniteError, Warnings, check_skipped
from utils.training.sessions import SESSIONS_FILE, record_rollback, record_start

if TYPE_CHECKING:
    from accelerate import Accelerator


METRICS_FILE = "metrics.jsonl"


class Tolerance:
    """Writes beside the checkpoints: where one fails (a full disk, a folder that is gone), the run
    goes on, and the first failure of each kind is one line.

    Before each of them `lock` is renewed, so that none reaches the folder of another run.
    """

    def __init__(self, lock: RunLock | None = None):
        self.lock, self.told = lock, set()

    @contextmanager
    def of(self, what: str, errors: type[Exception] = OSError) -> Iterator[None]:
        """For the block of a `with`; `what` is not written."""
        try:
            if self.lock:
                self.lock.renew()
            yield
        except errors as error:
            if what not in self.told:
                text = reason(error) if isinstance(error, OSError) else str(error)
                why = " ".join(text.split()) or type(error).__name__
                say(f"warning: {what} not written ({why}); the run does without")
            self.told.add(what)


class Tracker:
    """Sums the metrics of each step and writes their means; `add` costs no host synchronisation,
    `flush` costs one.

    A value that is not finite, of a metric whose name starts with one of `guarded`, stops the run:
    losses always; gradient norms too, unless a loss scale (fp16) is there to skip such steps.
    `status()` gives figures of the moment (learning rates, memory) for every line of metrics.jsonl,
    `warnings` look at it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        batch_size: int,
        guarded: tuple[str, ...] = ("loss/", "grad_norm/"),
        status: Callable[[], dict[str, float]] = dict,
        warnings: Warnings | None = None,
        tolerance: Tolerance | None = None,
    ):
        self.accelerator, self.path = accelerator, run_dir / METRICS_FILE
        self.batch_size, self.guarded, self.status = batch_size, guarded, status
        self.warnings, self.tolerance = warnings, tolerance or Tolerance()
        self.trackers = Trackers(accelerator, self.tolerance.of)
        self._clear()

    def _clear(self) -> None:
        self.names: list[str] = []
        self.sums = self.bad_step = torch.zeros(0)  # (terms,) float64 each
        self.count = 0
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
        if self.count and list(metrics) != self.names:
            self.flush(step)
        values = torch.stack([m.detach().float().reshape(()) for m in metrics.values()])
        if not self.count:
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
        if self.warnings:
            row |= self.warnings.look_at(row, self.warn)
        self.write(step, row)
        self._clear()
        return row

    def restart_clock(self) -> None:
        """Leave what was done since the last flush (pictures, checkpoints) out of images/s."""
        if not self.count:
            self.since, self.waited = time.perf_counter(), 0.0

    def _reduce(self) -> tuple[list[float], list[float]]:
        packed = torch.stack([self.sums / self.count, self.bad_step])
        every: Any = self.accelerator.gather(packed[None])  # (ranks, 2, terms)
        return every[:, 0].mean(dim=0).tolist(), every[:, 1].amin(dim=0).tolist()

    def _check(self, bad: list[float]) -> None:
        watched = [(b, n) for b, n in zip(bad, self.names) if n.startswith(self.guarded)]
        first, term = min(watched, key=lambda pair: pair[0], default=(math.inf, None))
        if first < math.inf:
            raise NonFiniteError(f"{term} is not finite at step {int(first)}", int(first))

    def warn(self, words: str) -> None:
        """A line of its own, beside the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(f"warning: {words}", file=sys.stderr)

    def write(self, step: int, row: dict[str, float]) -> None:
        """One line under `step` steps done, on the main process."""
        if not self.accelerator.is_main_process:
            return
        # JSON has no infinity: the gradient norm of a step that fp16 skipped becomes null
        clean = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with self.tolerance.of(f"line of {self.path}"):
            append_json(self.path, {"step": step} | clean)
        self.trackers.log(row, step)

    def write_picture(self, path: Path, picture: Image, what: str, step: int) -> None:
        """A PNG in the run's folder, which the trackers get as well, on the main process; `what` it
        shows after `step` steps."""
        with self.tolerance.of("pictures"):
            save_picture(path, picture)
        self.trackers.log_picture(what, picture, step)

    def sync(self) -> None:
        """Make all lines durable, before a checkpoint that counts on them."""
        if self.accelerator.is_main_process and self.path.is_file():
            with self.tolerance.of(f"line of {self.path}"):
                sync(self.path)

    def state_dict(self) -> dict[str, Any]:
        """What the next line is the mean of, for a checkpoint between two lines: the sums of all
        ranks, (ranks, 2, terms). All ranks call this together, and get the same."""
        state: dict[str, Any] = {"warnings": self.warnings.state_dict()} if self.warnings else {}
        if self.count:
            every: Any = self.accelerator.gather(torch.stack([self.sums, self.bad_step])[None])
            state |= {"names": self.names, "count": self.count, "sums": every.cpu()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; with another number of ranks, from the mean over the old."""
        self._clear()
        if self.warnings and "warnings" in state:
            self.warnings.load_state_dict(state["warnings"])
        if not state.get("count"):
            return
        every, here = state["sums"].to(self.accelerator.device), self.accelerator
        if len(every) == here.num_processes:
            self.sums, self.bad_step = every[here.process_index].clone()
        else:
            self.sums, self.bad_step = every[:, 0].mean(dim=0), every[:, 1].amin(dim=0)
        self.names, self.count = list(state["names"]), state["count"]

    def restart(self, checkpoint: Path, step: int) -> None:
        """Go back to what `checkpoint`, after `step` steps, knew; drop lines of later steps."""
        self.load_state_dict(read_averages(checkpoint))
        self.rewind(step)
        if self.accelerator.is_main_process:
            with self.tolerance.of(f"line of {SESSIONS_FILE}"):
                record_rollback(self.path.parent, step)

    def check(self) -> None:
        """Raise `NonFiniteError` as `flush` would now; nothing is written."""
        if self.count:
            self._check(self._reduce()[1])

    def rewind(self, step: int) -> None:
        """Drop lines and pictures of steps after `step`: a resumed run will write them again."""
        if not self.accelerator.is_main_process:
            return
        for picture in later_pictures(self.path.parent, step):
            picture.unlink()
        if not self.path.is_file():
            return
        text = self.path.read_bytes()
        kept = b"".join(line + b"\n" for line in text.split(b"\n") if _step_of(line) <= step)
        if kept != text:  # a line may also lack nothing but its end
            write_atomically(self.path, kept)


def _step_of(line: bytes) -> float:
    """Step of a metrics line; infinite for one that a kill cut short."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int | float) else math.inf


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """All whole lines of a metrics.jsonl."""
    return [row for row in read_json_lines(Path(path)) if isinstance(row.get("step"), int | float)]


def start(
    config: Config,
    accelerator: Accelerator,
    first: int,
    nets: Networks,
    latent_stats: dict | None = None,
    checkpoint: Path | None = None,
    lock: RunLock | None = None,
) -> Tracker:
    """Record the config (an earlier, different one is kept beside it) and the latent statistics
    that a new run starts with, open the trackers, and go on with the averages of `checkpoint`."""
    guarded = ("loss/",) if config.run.precision == "fp16" else ("loss/", "grad_norm/")
    guarded = () if config.run.on_nonfinite == "skip" else guarded
    status = partial(training_status, nets, accelerator.device, config.run.max_nonfinite)
    tracker = Tracker(
        accelerator, config.run_dir, config.run.batch_size, guarded, status, Warnings(config),
        Tolerance(lock),
    )  # fmt: skip
    if accelerator.is_main_process:
        try:
            own = Checkpoints(config.run_dir).folder.resolve()
            _record(config, first, checkpoint is not None and checkpoint.resolve().parent == own)
            if latent_stats:
                write_json(config.run_dir / "latent_stats.json", latent_stats)
            tracker.rewind(first)
            record_start(config.run_dir, accelerator, first, checkpoint)
        except OSError as error:
            raise UserError(
                f"cannot write in {config.run_dir} ({reason(error)}): make room, or choose another "
                "run.out"
            ) from None
    if checkpoint:
        tracker.load_state_dict(read_averages(checkpoint))
    if tracker.warnings:
        tracker.warnings.look_ahead(tracker.warn)
    tracker.trackers.open(config, first)
    return tracker


def finish(accelerator: Accelerator) -> None:
    """Close the trackers, and leave the group of ranks."""
    tolerance = Tolerance()
    Trackers(accelerator, tolerance.of).finish()
    with tolerance.of("last lines of the trackers", Exception):
        accelerator.end_training()


def training_status(
    nets: Networks, device: torch.device, max_skipped: int = sys.maxsize
) -> dict[str, float]:
    """Learning rate of each network (0: it does not move yet), loss scale of each under fp16, the
    number of updates left out, and on a GPU the peak memory in GiB since the last call. Raises
    `NonFiniteError` if more than `max_skipped` updates were left out."""
    status: dict[str, float] = {f"lr/{name}": net.lr for name, net in nets.trained.items()}
    skipped = {name: net.skipped for name, net in nets.trained.items() if net.skipped}
    status |= check_skipped(skipped, max_skipped, fp16=nets.precision == "fp16")
    for name, trained in nets.trained.items():
        if trained.scaler.is_enabled():
            status[f"loss_scale/{name}"] = trained.scaler.get_scale()
    if device.type == "cuda":
        status["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return status


def _record(config: Config, first: int, goes_on: bool = True) -> None:
    """Write config.yaml; one that differs is kept under the step it was good for, or as unused if
    the run does not go on from a checkpoint of its own. None that is kept is ever overwritten."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    path, text = config.run_dir / CONFIG_FILE, to_yaml(config).encode()
    before = path.read_bytes() if path.is_file() else text
    if before != text:
        ends = chain([""], (f"-{number}" for number in count(2)))
        name = f"config.{first:07d}" if goes_on else UNUSED_CONFIG
        copies = (path.with_name(f"{name}{end}.yaml") for end in ends)
        # one with the same content is that of a start that was killed here
        old = next(p for p in copies if not p.exists() or p.read_bytes() == before)
        write_atomically(old, before)
        print(f"the config has changed: the old one is kept as {old.name}")
    write_atomically(path, text)
