"""Curves and pictures beside metrics.jsonl: tensorboard and wandb, through accelerate's trackers.

One that fails, at the start or later, is reported once, and neither the run nor the other one ends.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL.Image import Image

from utils.config.load import flat
from utils.config.schema import Config
from utils.files import write_atomically

PROJECT = "repa-e"
ID_FILE = "wandb_id"  # in the run's folder: the run of wandb that it belongs to

# What reports a failure of the block of a `with`: utils.training.tracking.Tolerance.of
Tolerate = Callable[[str, type[Exception]], AbstractContextManager[None]]


class OwnStepWandB(WandBTracker):
    """wandb with the step as an axis of its own. wandb's internal step only grows: what a run that
    went back to an earlier checkpoint logs again would be dropped."""

    def start(self) -> None:
        super().start()
        self.run.define_metric("*", step_metric="step")

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        super().log(values | {"step": step}, **kwargs)


class Trackers:
    """Those of `run.trackers`; on the main process, which alone has any."""

    def __init__(self, accelerator: Accelerator, tolerate: Tolerate):
        self.all: list[Any] = accelerator.trackers  # of accelerate.tracking.GeneralTracker
        self.accelerator, self.tolerate = accelerator, tolerate

    def open(self, config: Config, first: int) -> None:
        """Begin, or go on after `first` steps."""
        settings = {name: str(value) for name, value in flat(asdict(config)).items()}
        for name in map(str, self.accelerator.log_with):
            if self.accelerator.is_main_process:
                with self.tolerate(f"curves of {name}", Exception):
                    tracker = make_tracker(name, config, first)
                    tracker.start()
                    self.all.append(tracker)
                    tracker.store_init_configuration(settings)

    def log(self, row: dict[str, float], step: int) -> None:
        """One log line; `step` steps are done."""
        for tracker in self.all:
            with self.tolerate(f"line of {tracker.name}", Exception):
                tracker.log(row, step=step)

    def log_picture(self, name: str, picture: Image, step: int) -> None:
        """One picture of what `step` steps have made."""
        images = np.asarray(picture.convert("RGB"))[None]  # both take several, (N, H, W, 3)
        for tracker in self.all:
            how = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with self.tolerate(f"picture of {tracker.name}", Exception):
                tracker.log_images({f"pictures/{name}": images}, step=step, **how)

    def finish(self) -> None:
        """Write what is left."""
        for tracker in self.all:
            with self.tolerate(f"last lines of {tracker.name}", Exception):
                tracker.finish()
        self.all.clear()


def make_tracker(name: str, config: Config, first: int) -> GeneralTracker:
    """One of config.validate.TRACKERS, in the run's folder."""
    if name == "tensorboard":
        # curves of later steps are those of a killed run
        folder = str(config.run_dir / "tensorboard")
        return TensorBoardTracker(PROJECT, folder, purge_step=first + 1)
    return OwnStepWandB(
        os.environ.get("WANDB_PROJECT", PROJECT),
        name=config.run.name,
        dir=str(config.run_dir),  # it makes a folder wandb/ there
        id=run_id(config.run_dir),
        resume="allow",
    )


def run_id(run_dir: Path) -> str:
    """The name by which wandb knows the run in this folder, made at its first start."""
    path = run_dir / ID_FILE
    if not path.is_file():
        write_atomically(path, f"{uuid.uuid4().hex[:12]}\n")
    return path.read_text().strip()
