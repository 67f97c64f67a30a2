"""What happens between training steps: log lines, checkpoints, previews, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.checkpoint import Checkpoints, contents_of
from utils.config.schema import Config
from utils.data.base import Source
from utils.training.networks import Networks
from utils.training.online_evaluation import OnlineEvaluation
from utils.training.preview import Previewer
from utils.training.tracking import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator


class PeriodicTasks:
    """Runs logging, checkpointing, previews and evaluation after a training step; saves first, so
    that a failure in a preview or an evaluation loses nothing."""

    def __init__(
        self,
        config: Config,
        source: Source,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        tracker: Tracker,
        evaluation: OnlineEvaluation,
    ):
        self.config, self.accelerator = config, accelerator
        self.checkpoints, self.tracker, self.num_images = checkpoints, tracker, len(source)
        self.previewer = Previewer(config, source, accelerator)
        self.evaluation = evaluation

    def run(self, nets: Networks, step: int, last: bool) -> dict[str, float]:
        """`step` steps are done; `last`: no other will follow. Returns the log line, {} if none was
        due."""
        run, row = self.config.run, {}
        saving = last or step % run.save_every == 0
        if saving or step % run.log_every == 0:
            row = self.tracker.flush(step)
        if saving:
            self.save(nets, step)
        if self.previewer.is_due(step, last):
            self.previewer.write(nets, step)
        if self.evaluation.is_due(step):
            self.tracker.write(step, self.evaluation.measure(nets))
        self.tracker.restart_clock()
        return row

    def save(self, nets: Networks, step: int) -> None:
        """One checkpoint, written by the main process while the others wait."""
        run = self.config.run
        state = {
            "epoch": step * run.batch_size / self.num_images,
            "seed": run.seed,
            "ranks": self.accelerator.num_processes,
            "path": self.config.loss.diffusion.path,
        }
        if self.accelerator.is_main_process:
            self.checkpoints.save(step, contents_of(nets).write, state)
        self.accelerator.wait_for_everyone()
