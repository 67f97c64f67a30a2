"""Rows of equally large images, each row with a title, drawn by matplotlib as one picture."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST_CELL = 96  # pixels: smaller images are enlarged
TITLE_WIDTH = 16  # characters in a line of a title
DPI = 100


class Row(NamedTuple):
    title: str
    notes: list[str]  # lines below the title
    panels: Tensor  # (N, 3, h, w) uint8


def save_grid_of_rows(path: Path, rows: list[Row], headings: list[str] | None = None) -> None:
    """Write a PNG with titles at the left and `headings` above the columns; print where it is."""
    from matplotlib.figure import Figure

    pixels = join_panels(rows)
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, interpolation="nearest")
    cell = height / len(rows)
    titles = ["\n".join([*textwrap.wrap(row.title, TITLE_WIDTH), *row.notes]) for row in rows]
    axes.set_yticks([cell * (i + 0.5) for i in range(len(rows))], titles)
    axes.set_xticks([cell * (j + 0.5) for j in range(len(headings or ()))], headings or ())
    axes.tick_params(length=0, labelsize=9, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    save_figure(figure, path, bbox_inches="tight", pad_inches=0.1)
    print(f"written to {path}")


def save_figure(figure: Figure, path: Path, **options) -> None:
    """Write a figure of matplotlib in the format that the ending names; a kill leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = path.suffix.removeprefix(".") or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=ending, **options))


def join_panels(rows: list[Row]) -> np.ndarray:
    """All panels as one image, (H, W, 3) uint8, white between them. A cell has the size of the
    largest panel, or a multiple of it; panels are enlarged to it by nearest neighbour."""
    cell = max(row.panels.shape[-1] for row in rows)
    cell *= -(-SMALLEST_CELL // cell)
    gap = max(2, cell // 32)
    columns = max(len(row.panels) for row in rows)
    pixels = np.full((len(rows), columns, cell + gap, cell + gap, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        panels = row.panels.permute(0, 2, 3, 1).cpu().numpy()
        nearest = np.arange(cell) * panels.shape[1] // cell
        pixels[i, : len(panels), :cell, :cell] = panels[:, nearest][:, :, nearest]
    return pixels.swapaxes(1, 2).reshape(len(rows) * (cell + gap), columns * (cell + gap), 3)


def name_of(path: Path) -> list[str]:
    """What tells a checkpoint or VAE folder from others: ["NAME", "0400000"], or ["my-vae"]."""
    parts = [p for p in path.absolute().parts if p not in ("vae", "checkpoints")]
    return parts[-2:] if parts[-1].isdigit() else parts[-1:]
