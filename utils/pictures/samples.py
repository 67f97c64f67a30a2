"""The first images of sample_ddp.py with the names of their classes."""

from pathlib import Path

from torch import Tensor

from utils.pictures.grid import Row, draw_rows, save_picture

COLUMNS = 8


def save_samples(path: Path, x_u8: Tensor, titles: list[str], num_in_turn: int = 0) -> None:
    """Write images (N, 3, H, W) with the title of each as one PNG.

    num_in_turn: number of the classes that follow each other in turn, which get a row each; 0 if
    the classes are in no order, for the title above each image.
    """
    if num_in_turn:
        num, columns = min(num_in_turn, len(x_u8)), max(1, min(COLUMNS, len(x_u8) // num_in_turn))
        rows = [Row(titles[i], [], x_u8[i::num_in_turn][:columns]) for i in range(num)]
    else:
        starts = range(0, len(x_u8), COLUMNS)
        parts = [slice(start, start + COLUMNS) for start in starts]
        rows = [Row("", [], x_u8[part], titles[part]) for part in parts]
    save_picture(path, draw_rows(rows))
