"""Every data source by its name: `SOURCES`, and `open_source`.

To add a source, write a subclass of `utils.data.base.Source` in a file of its own and add a row to
`SOURCES`. Classes are imported when they are opened: parsers use this file, and torch is slow.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UserError
from utils.cli import positive

if TYPE_CHECKING:
    from utils.data.base import Source

# name of data.source: (module, class)
SOURCES = {
    "digits": ("utils.data.toy", "DigitsSource"),
    "folder": ("utils.data.folder", "FolderSource"),
    "packed": ("utils.data.packed", "PackedSource"),
    "hdf5": ("utils.data.hdf5", "Hdf5Source"),
    "synthetic": ("utils.data.toy", "SyntheticSource"),
}


def source_class(name: str, split: str = "all") -> type[Source]:
    """The class of a source; `UserError` for an unknown name, or a split that it does not have."""
    if name not in SOURCES:
        raise UserError(f"data.source={name!r}: expected one of {', '.join(SOURCES)}")
    module, cls = SOURCES[name]
    cls = getattr(import_module(module), cls)
    if split not in cls.splits:
        known = ", ".join(cls.splits)
        raise UserError(f"split {split!r} of data.source={name}: expected one of {known}")
    return cls


def open_source(
    name: str, path: str | Path | None = None, resolution: int = 256, split: str = "all"
) -> Source:
    """Open a data set; `UserError` if it is not there. `path` is ignored where none is needed."""
    cls = source_class(name, split)
    if not cls.needs_path:
        return cls(None, resolution, split)
    kind = "file or folder" if cls.path_may_be_file else "folder"
    if path is None:
        raise UserError(f"data.source={name} needs data.path, the {kind} of the images")
    root = Path(path).expanduser()
    if not (root.is_dir() or (cls.path_may_be_file and root.is_file())):
        raise UserError(f"data.path={path}: no such {kind} (data.source={name}); correct the path")
    return cls(root, resolution, split)


def add_source_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--data --path --resolution --split, for `open_source_of`."""
    add = parser.add_argument
    add("--data", choices=SOURCES, required=required, help="kind of the images, as data.source")
    add("--path", help="folder of the images, as data.path")
    add("--resolution", type=positive, default=256, help="side of the images, in pixels")
    add("--split", default="all", help="part of the images, as data.split; digits: train or test")


def open_source_of(args: argparse.Namespace) -> Source:
    """The source that the arguments name."""
    return open_source(args.data, args.path, args.resolution, args.split)
