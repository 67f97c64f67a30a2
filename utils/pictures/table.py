"""A table of text as a picture: a head, lines of cells, some of them bold, and notes below."""

import textwrap
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from utils.pictures.grid import save_figure

CHARACTER, LINE = 0.088, 0.27  # inches of a character and of a line of text
GAP, MARGIN = 3, 0.25  # characters between columns, inches around the table
LONGEST_CELL = 48  # characters; the beginning of a longer one is left out
SMALLEST_WIDTH = 8.0  # inches
TEXT, SMALL = 10, 8.5  # points
INK, FAINT = "black", "0.35"


def save_table(
    path: Path, head: Sequence[str], lines: Sequence[Sequence[tuple[str, bool]]],
    notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write a table as a PNG. The first column and the last one are aligned to the left, numbers
    between them to the right. `lines`: (text, whether it is bold) of each cell."""
    # it takes a second to import, which the evaluator need not wait for
    from matplotlib.figure import Figure

    rows = [[(text, True) for text in head], *lines]
    rows = [[(_shortened(text), bold) for text, bold in row] for row in rows]
    widths = [max(len(row[i][0]) for row in rows) for i in range(len(head))]
    edges = [0, *accumulate(width + GAP for width in widths)]
    width = max(SMALLEST_WIDTH, (edges[-1] - GAP) * CHARACTER + 2 * MARGIN)
    wrap = int((width - 2 * MARGIN) / CHARACTER * TEXT / SMALL)
    below = [line for note in notes for line in textwrap.wrap(note, wrap, subsequent_indent="  ")]
    height = (len(rows) + 0.8) * LINE + len(below) * LINE * 0.75 + 2 * MARGIN
    figure = Figure(figsize=(width, height))

    def write(x: float, y: float, text: str, **style) -> None:
        # dollars are no formula here
        figure.text(x / width, 1 - y / height, text, va="center", parse_math=False, **style)

    def rule(y: float, thickness: float) -> None:
        figure.add_artist(Line2D([MARGIN / width, 1 - MARGIN / width], [1 - y / height] * 2,
                                 color=INK, linewidth=thickness))  # fmt: skip

    from matplotlib.lines import Line2D

    y = MARGIN
    for number, row in enumerate(rows):
        y += LINE
        for i, (text, bold) in enumerate(row):
            left = i in (0, len(row) - 1)
            x = MARGIN + (edges[i] if left else edges[i] + widths[i]) * CHARACTER
            weight = "bold" if bold else "normal"
            write(x, y - LINE / 2, text, ha="left" if left else "right", weight=weight, size=TEXT)
        if number in (0, len(rows) - 1):
            rule(y, 0.8)
    rule(MARGIN, 1.2)
    y += 0.3 * LINE
    for line in below:
        y += LINE * 0.75
        write(MARGIN, y, line, ha="left", size=SMALL, color=FAINT)
    save_figure(figure, path, dpi=150)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_CELL else f"...{text[3 - LONGEST_CELL :]}"
