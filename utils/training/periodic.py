"""What happens between training steps: log lines, checkpoints, previews, evaluation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from utils.checkpoint import Checkpoints, Contents, contents_of
from utils.config.load import CONFIG_FILE, to_yaml
from utils.config.resuming import defining_settings
from utils.config.schema import Config
from utils.data.base import Source
from utils.distributed import Ranks, StopSignal
from utils.files import reason, write_atomically
from utils.pictures.preview import Previewer, is_drawn
from utils.process.ending import say
from utils.process.heartbeat import Stopped
from utils.sampling.labels import names_by_label
from utils.sealed import ModelIndex
from utils.training.networks import Networks
from utils.training.nonfinite import require_finite
from utils.training.online_evaluation import OnlineEvaluation
from utils.training.tracking import METRICS_FILE, Tracker, read_metrics

if TYPE_CHECKING:
    from accelerate import Accelerator

# Seconds that a run which was told to stop waits for room for its checkpoint: a launcher kills it
# 30 s after it has passed the signal on.
PATIENCE = 10.0
RETRY = 5.0  # seconds between two attempts to save


class NotSavedError(RuntimeError):
    """The last checkpoint of the run could not be written: the message says why."""


class PeriodicTasks:
    """Runs logging, checkpointing, previews and evaluation after a training step; saves first, so
    that a failure in a preview or an evaluation loses nothing.

    `stopped`: a signal has cut off a preview or an evaluation; the checkpoint of that step exists,
    and the run is to end.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        tracker: Tracker,
        evaluation: OnlineEvaluation,
        stop: StopSignal | None = None,
    ):
        self.config, self.accelerator, self.ranks = config, accelerator, Ranks()
        self.checkpoints, self.tracker, self.source = checkpoints, tracker, source
        self.previewer = Previewer(config, source, accelerator)
        self.evaluation, self.stop, self.stopped = evaluation, stop, False

    def run(
        self, nets: Networks, step: int, last: bool, stopping: bool = False
    ) -> dict[str, float]:
        """`step` steps are done; `last`: no other will follow; `stopping`: a signal ends the run
        here, so that nothing is done but to save. Returns the log line, {} if none was due."""
        run, row = self.config.run, {}
        due = last or step % run.save_every == 0
        if due or step % run.log_every == 0:
            row = self.tracker.flush(step)
        if due or stopping:
            self.save(nets, step, last, stopping)
        if not stopping:
            try:
                self._show(nets, step, due_tasks(self.config, step, last))
            except Stopped:  # on all ranks
                self.stopped = True
                if not due:
                    self.save(nets, step, stopping=True)
        self.tracker.restart_clock()
        return row

    def catch_up(self, nets: Networks, step: int) -> None:
        """Make good what was due at `step` and was cut off by a signal or a kill; `nets` are those
        of that checkpoint of this run. `Stopped` if a signal comes again."""
        self._show(nets, step, unfinished(self.config, step))

    def _show(self, nets: Networks, step: int, tasks: list[str]) -> None:
        """Preview and evaluation, if they are among `tasks`; `Stopped` on every rank if a signal
        comes."""
        check = self.stop.check if self.stop else lambda: None

        def write(path: Path, picture: Image, what: str) -> None:
            self.tracker.write_picture(path, picture, what, step)

        if not tasks:
            return
        with nets.update_ema.whole():
            if "preview" in tasks:
                self.ranks.on_main(lambda: self.previewer.write(nets, step, write, check))
            if "evaluation" in tasks:
                # of several ranks, none may leave a reduction alone
                together = self.stop.check_all if self.stop else lambda: None
                if values := self.evaluation.measure(nets, together):
                    self.tracker.write(step, values)

    def save(self, nets: Networks, step: int, last: bool = False, stopping: bool = False) -> None:
        """One checkpoint, written by the main process while the others wait. `NonFiniteError` if
        the state is not finite.

        If it cannot be written, the run goes on, and earlier checkpoints stay as they are. At the
        end of the run, and when it was told to stop, this waits for room: at most `run.disk_wait`
        minutes or `PATIENCE` seconds; then it raises `NotSavedError` on every rank.
        """
        self.tracker.check()
        with nets.update_ema.whole():
            require_finite(nets.tensors(), self.accelerator, step)
            # here and not on the main process alone: ranks hand in what they have shared out
            names = names_by_label(self.source.classes)
            index = ModelIndex(self.config.loss.diffusion.path, names)
            contents = contents_of(nets, self.tracker.state_dict(), index)
            problem = self.ranks.on_main(lambda: self._try_to_write(contents, step, last, stopping))
        if problem and (last or stopping):
            raise NotSavedError(problem)

    def _try_to_write(
        self, contents: Contents, step: int, last: bool, stopping: bool
    ) -> str | None:
        """Why the checkpoint could not be written; None if it was. Waits as `save` says."""
        wait = PATIENCE if stopping else 60 * self.config.run.disk_wait if last else 0
        end, told = time.monotonic() + wait, False
        while True:
            try:
                self._write(contents, step, prune=not stopping)
                return None
            except OSError as error:
                problem = f"the checkpoint of step {step} could not be saved ({reason(error)})"
            left = end - time.monotonic()
            if left <= 0 or (self.stop and self.stop.received and not stopping):
                break
            if not told:
                say(f"warning: {problem}; waiting up to {wait / 60:.3g} min for room")
            told = True
            time.sleep(min(RETRY, left))
        if not (last or stopping):
            say(f"warning: {problem}; the run goes on, and saves again when that is due")
        return problem

    def _write(self, contents: Contents, step: int, prune: bool) -> None:
        """OSError if that is not possible."""
        c, lock = self.config, self.tracker.tolerance.lock
        if lock:
            lock.renew()
        if not (c.run_dir / CONFIG_FILE).exists():  # the folder was deleted
            write_atomically(c.run_dir / CONFIG_FILE, to_yaml(c))
        self.tracker.sync()
        state = {
            "epoch": step * c.run.batch_size / len(self.source),
            "seed": c.run.seed,
            "ranks": self.ranks.world,
            "path": c.loss.diffusion.path,
            "classes": list(self.source.classes),
            "content": self.source.content,
            "config": defining_settings(c),
        }
        self.checkpoints.save(step, contents.write, state, contents.num_bytes(), prune)


def due_tasks(config: Config, step: int, last: bool) -> list[str]:
    """What follows after `step` steps besides log line and checkpoint; `last`: the run is over."""
    every, evaluate_every = config.preview.every, config.eval.every
    preview = every > 0 and (last or step % every == 0)
    evaluation = evaluate_every > 0 and step % evaluate_every == 0
    return ["preview"] * preview + ["evaluation"] * evaluation


def unfinished(config: Config, step: int) -> list[str]:
    """What is due after `step` steps and was cut off, of a run that has a checkpoint of that step:
    the same on every rank."""

    def find() -> list[str]:
        if not Checkpoints(config.run_dir).path(step).is_dir():
            return []  # a new run, or the checkpoint of another one
        path, there = config.run_dir / METRICS_FILE, set()
        if is_drawn(config.run_dir, step):
            there.add("preview")
        rows = [row for row in read_metrics(path) if row["step"] == step] if path.is_file() else []
        if any(name.startswith("eval/") for row in rows for name in row):
            there.add("evaluation")
        due = due_tasks(config, step, step == config.run.steps)
        return [task for task in due if task not in there]

    return Ranks().on_main(find) or []
