"""Pictures during training: EMA samples from noises that never change (images 0, 1, ... of the
run's seed, as sample_ddp.py makes them with balanced labels), reconstructions, and latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image
from torch import Tensor

from models.checks.errors import printable
from utils.checkpoint import is_step
from utils.config.schema import Config
from utils.data.base import Source
from utils.data.images import pm1_to_u8, u8_to_pm1
from utils.pictures.grid import Row, draw_rows
from utils.pictures.pca import fit_basis, to_rows
from utils.sampling.images import begin_images
from utils.sampling.labels import readable_names, short_name
from utils.sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from accelerate import Accelerator

COLUMNS = 8
MOST_COLUMNS = 10  # of classes side by side; more have their names above each image
CHUNK = 16  # images sampled at a time


def picture_files(run_dir: Path, step: int) -> dict[str, Path]:
    """The pictures after `step` steps by what they show, in the order in which they are written:
    latents, reconstructions, samples."""
    folder, name = run_dir / "samples", f"{step:07d}"
    beside = {what: folder / f"{name}-{what}.png" for what in ("latents", "reconstructions")}
    return beside | {"samples": folder / f"{name}.png"}


def is_drawn(run_dir: Path, step: int) -> bool:
    """Whether the pictures after `step` steps have been written. That of latents, which comes
    first, does not count: earlier versions drew none."""
    files = picture_files(run_dir, step)
    return files["reconstructions"].is_file() and files["samples"].is_file()


def later_pictures(run_dir: Path, step: int) -> list[Path]:
    """The pictures of steps after `step`, as `picture_files` names them."""
    found = []
    for file in (run_dir / "samples").glob("*.png"):
        name = file.stem.partition("-")[0]
        ours = picture_files(run_dir, int(name)).values() if is_step(name) else ()
        if file in ours and int(name) > step and file.is_file():
            found.append(file)
    return found


class Previewer:
    """Draws the pictures that `picture_files` names, on the main process.

    `nets` are the networks of a run (utils.training.networks.Networks).
    """

    def __init__(self, config: Config, source: Source, accelerator: Accelerator):
        self.config, self.source, self.device = config, source, accelerator.device
        self.is_main = accelerator.is_main_process

    def write(
        self,
        nets,
        step: int,
        write: Callable[[Path, Image, str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Draw all pictures after `step` steps and call `write(path, picture, what it shows)` for
        each. `check` is called between two parts of the work, and may raise to end it."""
        if not self.is_main:
            return
        draw = {
            "latents": lambda: draw_latents(x_u8, z),
            "reconstructions": lambda: draw_pairs(("real", x_u8), ("reconstructed", x_hat_u8)),
            "samples": lambda: draw_samples(self.sample(nets, check), self.source.classes),
        }
        x_u8, x_hat_u8, z = self.encode(nets)
        for what, path in picture_files(self.config.run_dir, step).items():
            check()
            write(path, draw[what](), what)

    @torch.no_grad()
    def sample(self, nets, check: Callable[[], None] = lambda: None) -> Tensor:
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
    def encode(self, nets) -> tuple[Tensor, Tensor, Tensor]:
        """2 * COLUMNS images and their reconstructions, (N, 3, H, W) uint8, and their latents
        (N, C, h, w) float32, all on the CPU."""
        total, num = len(self.source), 2 * COLUMNS
        images = [self.source.take(i * total // num)[0] for i in range(num)]
        parts = []
        for x_u8 in torch.stack(images).to(self.device).split(COLUMNS):
            with nets.autocast():
                z = nets.vae.encode(u8_to_pm1(x_u8)).mean
                x_hat = nets.vae.decode(z)
            parts.append((x_u8.cpu(), pm1_to_u8(x_hat).cpu(), z.float().cpu()))
        x_u8, x_hat_u8, z = (torch.cat(part) for part in zip(*parts))
        return x_u8, x_hat_u8, z


def draw_samples(x_u8: Tensor, classes: Sequence[str]) -> Image:
    """Images (N, 3, H, W) whose labels run through the classes in order, with their names: above
    the columns where the classes are few, else above each image."""
    num, most = len(classes), min(len(x_u8), len(classes))
    shown = [printable(name) for name in classes[:most]]
    names = [short_name(name, i) for i, name in enumerate(readable_names(shown))]
    if num == 1:
        return draw_rows([Row("", [], part) for part in x_u8.split(COLUMNS)])
    if num <= MOST_COLUMNS:
        columns = MOST_COLUMNS // num * num
        rows = [Row("", [], part) for part in x_u8.split(columns)]
        return draw_rows(rows, (names * columns)[: min(columns, len(x_u8))])
    rows = []
    for start, part in zip(range(0, len(x_u8), COLUMNS), x_u8.split(COLUMNS)):
        captions = [names[(start + i) % num] for i in range(len(part))]
        rows.append(Row("", [], part, captions))
    return draw_rows(rows)


def draw_pairs(*kinds: tuple[str, Tensor], notes: Sequence[str] = ()) -> Image:
    """A row of images of each kind, (title, (N, 3, H, W) uint8), then the next COLUMNS of each;
    `notes` stand below the titles of the last kind."""
    rows = []
    for start in range(0, len(kinds[0][1]), COLUMNS):
        rows += [Row(title, [], x[start : start + COLUMNS]) for title, x in kinds]
        rows[-1] = rows[-1]._replace(notes=[*notes])
    return draw_rows(rows)


def draw_latents(x_u8: Tensor, z: Tensor) -> Image:
    """Images over their latents (N, C, h, w), whose three principal components are red, green and
    blue. Numbers that are not finite count as 0: a picture shall show what a run has become."""
    z = torch.nan_to_num(z, nan=0.0, posinf=0.0, neginf=0.0)
    colours = fit_basis(to_rows(z)).colours(z)
    shape = " x ".join(map(str, z.shape[1:]))
    return draw_pairs(("image", x_u8), ("latents", colours), notes=[shape])
