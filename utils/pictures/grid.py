"""Rows of equally large images with their names, as one picture: titles at the left of the rows,
headings above the columns, captions above single images.

Every pixel of an image is kept, and the text is drawn in the DejaVu Sans that comes with
matplotlib: the same images give the same file on every machine.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from utils.files import write_atomically
from utils.process.written import PROGRAM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST_CELL = 96  # pixels: smaller images are enlarged
TITLE_WIDTH = 16  # characters in a line of a title
FONT = "mpl-data/fonts/ttf/DejaVuSans.ttf"  # in the folder of matplotlib
SMALLEST_TEXT, LARGEST_TEXT = 13, 26  # pixels
MARGIN = 10  # pixels around the picture, and between text and images
INK, PAPER = (0, 0, 0), (255, 255, 255)


class Row(NamedTuple):
    title: str
    notes: list[str]  # lines below the title
    panels: Tensor  # (N, 3, h, w) uint8
    captions: Sequence[str] = ()  # one above each panel


def save_grid_of_rows(path: Path, rows: list[Row], headings: Sequence[str] | None = None) -> None:
    """Write `draw_rows` as a PNG; print where it is."""
    save_picture(path, draw_rows(rows, headings or ()))
    print(f"written to {path}")


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG; a kill leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = PngInfo()
    mark.add_text("Software", PROGRAM)
    write_atomically(path, lambda file: picture.save(file, "PNG", pnginfo=mark))


def save_figure(figure: Figure, path: Path, **options) -> None:
    """Write a figure of matplotlib as a PNG; a kill leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options |= {"format": "png", "metadata": {"Software": PROGRAM}}
    write_atomically(path, lambda file: figure.savefig(file, **options))


def draw_rows(rows: list[Row], headings: Sequence[str] = ()) -> Image.Image:
    """The picture of all rows. Headings and captions that are wider than an image are cut."""
    cell = size_of_cell(rows)
    font = font_of(min(max(SMALLEST_TEXT, cell // 12), LARGEST_TEXT))
    line = sum(font.getmetrics())
    captions = line if any(row.captions for row in rows) else 0
    pixels = join_panels(rows, captions)
    titles = ["\n".join([*textwrap.wrap(row.title, TITLE_WIDTH), *row.notes]) for row in rows]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(round(ruler.multiline_textbbox((0, 0), title, font)[2]) for title in titles)
    x0 = MARGIN + (left + MARGIN if left else 0)
    y0 = MARGIN + (line + MARGIN // 2 if headings else 0)
    height, width = pixels.shape[:2]
    picture = Image.new("RGB", (x0 + width + MARGIN, y0 + height + MARGIN), PAPER)
    picture.paste(Image.fromarray(pixels), (x0, y0))
    draw = ImageDraw.Draw(picture)
    step = cell + gap_of(cell)
    for j, heading in enumerate(headings):
        place = (x0 + j * step + cell // 2, MARGIN)
        draw.text(place, shortened(heading, font, cell), INK, font, anchor="ma")
    for i, row in enumerate(rows):
        y = y0 + i * (step + captions)
        middle = (x0 - MARGIN, y + captions + cell // 2)
        draw.multiline_text(middle, titles[i], INK, font, anchor="rm", align="right")
        for j, caption in enumerate(row.captions):
            place = (x0 + j * step + cell // 2, y)
            draw.text(place, shortened(caption, font, cell), INK, font, anchor="ma")
    return picture


def join_panels(rows: list[Row], above: int = 0) -> np.ndarray:
    """All panels as one image, (H, W, 3) uint8, white between them and in the `above` pixels over
    each row. Panels are enlarged to the size of a cell by nearest neighbour."""
    cell = size_of_cell(rows)
    step = cell + gap_of(cell)
    columns = max(len(row.panels) for row in rows)
    pixels = np.full((len(rows), columns, above + step, step, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        panels = row.panels.permute(0, 2, 3, 1).cpu().numpy()
        nearest = np.arange(cell) * panels.shape[1] // cell
        place = pixels[i, : len(panels), above : above + cell, :cell]
        place[:] = panels[:, nearest][:, :, nearest]
    return pixels.swapaxes(1, 2).reshape(len(rows) * (above + step), columns * step, 3)


def size_of_cell(rows: list[Row]) -> int:
    """Side in pixels of every image in the picture: that of the largest, or a multiple of it."""
    side = max(row.panels.shape[-1] for row in rows)
    return side * -(-SMALLEST_CELL // side)


def gap_of(cell: int) -> int:
    """White pixels behind each image."""
    return max(2, cell // 32)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text in one line, cut with an ellipsis where it is wider than so many pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, `size` pixels high; its file is found without the seconds of matplotlib."""
    found = find_spec("matplotlib")
    assert found and found.submodule_search_locations, "requirements.txt names matplotlib"
    path = Path(found.submodule_search_locations[0], FONT)
    # the layout of Pillow itself: that of libraqm is not on every machine
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def name_of(path: Path) -> list[str]:
    """What tells a checkpoint or VAE folder from others: ["NAME", "0400000"], or ["my-vae"]."""
    parts = [p for p in path.absolute().parts if p not in ("vae", "checkpoints")]
    return parts[-2:] if parts[-1].isdigit() else parts[-1:]
