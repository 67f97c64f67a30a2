"""A picture of rows of equally large images, each row named at its left."""

import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_CELL = 96  # pixels: smaller images are enlarged
FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # Pillow's own is ASCII only
GREY = (110, 110, 110)
LINE = 1.3  # distance of lines, in font sizes

Line = tuple[str, ImageFont.FreeTypeFont, str | tuple[int, int, int]]  # text, font, colour


class Row(NamedTuple):
    title: str
    notes: list[str]  # small lines below the title
    panels: Tensor  # (N, 3, h, w) uint8


def draw_grid(rows: list[Row], headings: list[str] | None = None) -> Image.Image:
    """A cell has the size of the largest panel, or a multiple; the others are enlarged to it by
    nearest neighbour. `headings` are small, above the columns."""
    cell = max(row.panels.shape[-1] for row in rows)
    cell *= -(-SMALLEST_CELL // cell)
    gap, size = max(2, cell // 32), min(22, max(13, cell // 9))
    large, small = (ImageFont.truetype(FONT, s) for s in (size, max(11, size * 3 // 4)))
    texts = [_label(row, large, small) for row in rows]
    left = int(max(font.getlength(line) for text in texts for line, font, _ in text)) + size
    top = int(1.6 * small.size) if headings else gap
    columns = max(len(row.panels) for row in rows)
    extent = (left + columns * (cell + gap), top + len(rows) * (cell + gap))
    picture = Image.new("RGB", extent, "white")
    pen = ImageDraw.Draw(picture)
    for i, (row, text) in enumerate(zip(rows, texts)):
        y = top + i * (cell + gap)
        _write(pen, text, left - size // 2, y + cell // 2)
        for j, panel in enumerate(row.panels):
            tile = Image.fromarray(panel.permute(1, 2, 0).cpu().numpy())
            tile = tile.resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(tile, (left + j * (cell + gap), y))
    for j, heading in enumerate(headings or ()):
        x = left + j * (cell + gap) + cell // 2
        pen.text((x, top // 2), heading, fill=GREY, font=small, anchor="mm")
    return picture


def _label(row: Row, large: ImageFont.FreeTypeFont, small: ImageFont.FreeTypeFont) -> list[Line]:
    """From top to bottom; a long title takes several lines."""
    lines = [(line, large, "black") for line in textwrap.wrap(row.title, 16) or [""]]
    return lines + [(note, small, GREY) for note in row.notes]


def _write(pen: ImageDraw.ImageDraw, text: list[Line], right: int, middle: int) -> None:
    """Lines flush right, centred vertically."""
    y = middle - LINE * sum(font.size for _, font, _ in text) / 2
    for line, font, colour in text:
        pen.text((right, y + LINE / 2 * font.size), line, fill=colour, font=font, anchor="rm")
        y += LINE * font.size
