"""Pictures during training: EMA samples from noises that never change (images 0, 1, ... of the
run's seed, as sample_ddp.py makes them with balanced labels), and reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils.checkpoint import is_step
from utils.config.schema import Config
from utils.data.base import Source
from utils.data.images import pm1_to_u8, save_grid, u8_to_pm1
from utils.sampling.images import begin_images
from utils.sampling.settings import SamplingSettings
from utils.training.networks import Networks

if TYPE_CHECKING:
    from accelerate import Accelerator

COLUMNS = 8
CHUNK = 16  # images sampled at a time


def picture_files(run_dir: Path, step: int) -> tuple[Path, Path]:
    """The pictures of samples and of reconstructions after `step` steps."""
    folder = run_dir / "samples"
    return folder / f"{step:07d}.png", folder / f"{step:07d}-reconstructions.png"


def later_pictures(run_dir: Path, step: int) -> list[Path]:
    """The pictures of steps after `step`, as `picture_files` names them."""
    files = [file for file in (run_dir / "samples").glob("*.png") if file.is_file()]
    numbers = {file: file.stem.removesuffix("-reconstructions") for file in files}
    return [file for file, name in numbers.items() if is_step(name) and int(name) > step]


class Previewer:
    """Writes samples/STEP.png and samples/STEP-reconstructions.png on the main process."""

    def __init__(self, config: Config, source: Source, accelerator: Accelerator):
        self.config, self.source, self.device = config, source, accelerator.device
        self.is_main = accelerator.is_main_process

    def write(
        self,
        nets: Networks,
        step: int,
        check: Callable[[], None] = lambda: None,
        write: Callable[..., None] = save_grid,
    ) -> None:
        """Draw both pictures after `step` steps, and `write` them. `check` is called between two
        parts of the work, and may raise to end it."""
        if not self.is_main:
            return
        scale = max(1, 64 // self.config.data.resolution)
        samples, reconstructions = picture_files(self.config.run_dir, step)
        write(samples, self.draw_samples(nets, check), COLUMNS, scale)
        check()
        write(reconstructions, self.reconstruct(nets), COLUMNS, scale)

    @torch.no_grad()
    def draw_samples(
        self, nets: Networks, check: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        """(N, 3, H, W) uint8 of the EMA weights; the labels run through the classes in order."""
        p, half = self.config.preview, nets.precision != "fp32"
        settings = SamplingSettings(
            seed=self.config.run.seed,
            solver=p.solver,
            steps=p.steps,
            cfg_scale=p.cfg_scale,
            class_balanced=True,
            path=self.config.loss.diffusion.path,
            precision=nets.precision,
            decode_precision=nets.precision if half else None,
            batch_size=CHUNK,
            decode_batch_size=CHUNK,
        )
        check()
        drawn = begin_images(
            settings, nets.ema, nets.vae, range(p.num), self.device, lambda _: check()
        )
        return drawn.result(must_be_finite=False)  # a picture shall show what the run has become

    @torch.no_grad()
    def reconstruct(self, nets: Networks) -> torch.Tensor:
        """(4 * COLUMNS, 3, H, W) uint8: a row of images, one of their reconstructions; twice."""
        total = len(self.source)
        rows = []
        for start in (0, COLUMNS):
            indices = [(start + i) * total // (2 * COLUMNS) for i in range(COLUMNS)]
            x_u8 = torch.stack([self.source.take(i)[0] for i in indices]).to(self.device)
            with nets.autocast():
                x_hat = nets.vae.decode(nets.vae.encode(u8_to_pm1(x_u8)).mean)
            rows += [x_u8, pm1_to_u8(x_hat)]
        return torch.cat(rows)
