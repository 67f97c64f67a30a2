"""Samples as single images: a folder of numbered PNGs with a list of their labels.

DIR/000000.png ...   image i under its number, the pixels of the .npz
DIR/labels.csv       file, label, class: written last, so a folder with it is complete
DIR/plan.json        the settings; other images are never mixed into the folder
"""

import csv
import io
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from models.checks.errors import UserError
from utils.cli import check_output_folder
from utils.data.sharded import PLAN, ShardedFolder
from utils.files import reason, write_atomically, write_json

LABELS = "labels.csv"


class PngFolder:
    """The folder of one command's images. A file is whole or absent, whatever killed its writer;
    those that are there are kept."""

    def __init__(self, folder: Path, plan: dict, num_images: int):
        self.folder, self.num_images = folder, num_images
        # nothing but the check of its plan is used: images have files of their own here
        self.plan = ShardedFolder(folder, plan=plan, num_items=num_images, shard_size=1, rows={})

    def check(self) -> None:
        """`UserError` if something else is there, or if nothing can be written."""
        check_output_folder("--png", self.folder)
        try:
            self.plan.check_plan()
        except UserError as error:
            raise UserError(f"--png: {error}") from None

    def begin(self) -> None:
        """`check`, and make the folder if there is none."""
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / PLAN, self.plan.plan)

    def is_done(self) -> bool:
        return (self.folder / LABELS).is_file() and not any(self.missing(range(self.num_images)))

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Those of the images that are not there."""
        return [i for i in indices if not self.file(i).is_file()]

    def file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def write(self, indices: range, read: Callable[[], np.ndarray]) -> None:
        """Write those of the images that are missing; `read()` gives all of them, (n, H, W, 3)
        uint8, and is not called if none is."""
        if not (missing := self.missing(indices)):
            return
        images = read()
        for i in missing:
            picture = Image.fromarray(np.ascontiguousarray(images[i - indices.start]))
            save = partial(picture.save, format="PNG")
            try:
                write_atomically(self.file(i), save)
            except OSError as error:
                raise UserError(f"--png {self.folder} cannot be written ({reason(error)}): mend "
                                "that, and run the command again") from None  # fmt: skip

    def finish(self, y: Iterable[int], titles: Iterable[str]) -> None:
        """Write the list of the labels; all images are there."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["file", "label", "class"])
        rows.writerows([self.file(i).name, *row] for i, row in enumerate(zip(y, titles)))
        write_atomically(self.folder / LABELS, text.getvalue())
