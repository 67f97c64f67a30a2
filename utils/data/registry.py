"""Every data source by its name: `SOURCES`, and `open_source`.

To add a source, write a subclass of `utils.data.base.Source` in a file of its own and add a row to
`SOURCES`. Classes are imported when they are opened: parsers use this file, and torch is slow.
"""

from __future__ import annotations

import argparse
import difflib
import os
from fnmatch import fnmatch
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import UserError, shown, what_is
from utils import cli
from utils.files import read_record

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

MOST_RESOLUTION = 8192  # pixels
# What to do with a file in the place of a folder: words of `what_is`, or a part of its name.
REMEDIES = (
    (".parquet", "export its images into class folders"),
    (".pt", "give the folder of the images"),
    ("archive", "unpack it, and give the folder"),
    ("empty zip", "it holds nothing"),
    (".tar", "unpack it, and give the folder"),
    ("HDF5", "give its folder, with data.source=hdf5"),
    ("NumPy", "write its images into class folders"),
    ("image", "give its folder, with data.source=folder"),
    ("JSON", "give its folder"),
)
# What a folder seems to be: names in it, the source that reads it, words.
FOLDERS = (
    ("images.h5", "hdf5", "the official HDF5 layout: data.source=hdf5"),
    ("checkpoints", "", "the folder of a run"),
    ("*.safetensors", "", "a folder of weights"),
    ("*.parquet", "", "parquet files: export their images into class folders"),
    ("*.arrow", "", "Arrow files: export their images into class folders"),
    ("*.tar", "", "tar archives (webdataset): unpack them into class folders"),
    ("*.zip", "", "zip archives: unpack them"),
)
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
WALKED = 100  # folders in which images are looked for


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
    if not (isinstance(resolution, int) and 1 <= resolution <= MOST_RESOLUTION):
        raise UserError(f"resolution {shown(resolution)}: expected 1 .. {MOST_RESOLUTION} pixels")
    if not cls.needs_path:
        return cls(None, resolution, split)
    kind = "file or folder" if cls.path_may_be_file else "folder"
    if path is None:
        raise UserError(f"data.source={name} needs data.path, the {kind} of the images")
    root = Path(cli.expand_path(str(path)))
    if not (os.path.isdir(root) or (cls.path_may_be_file and os.path.isfile(root))):
        raise UserError(f"data.path={path}: {_what_is_wrong(root, kind)} (data.source={name})")
    try:
        return cls(root, resolution, split)
    except UserError as error:
        other = _folder_of_another_kind(root, name)
        if other is None:
            raise
        raise UserError(f"{error}; {root} looks like {other}") from None


def _what_is_wrong(root: Path, kind: str) -> str:
    """Why `root` is not the `kind` that it should be, and what to do."""
    found = what_is(root)
    if found == "absent":
        parent = root.absolute().parent
        names = os.listdir(parent) if os.path.isdir(parent) else []
        close = difflib.get_close_matches(root.name, names, n=1)
        remedy = f"did you mean {parent / close[0]}?" if close else "correct the path"
        return f"no such {kind}; {remedy}"
    remedy = next((words for part, words in REMEDIES if part in found or part in root.name), "")
    return f"it is {found}, expected a {kind}; {remedy or f'give the {kind} of the images'}"


def _folder_of_another_kind(root: Path, name: str) -> str | None:
    """What a folder seems to hold, and how to use it; None if nothing but what `name` reads."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return None
    if not names:
        return "an empty folder"
    record = read_record(root / "plan.json") or read_record(root / "meta.json") or {}
    formats = {"repae-packed-1": ("packed", "packed data: data.source=packed")}
    formats["repae-latents-1"] = ("", "cached latents: data.latents, beside data.path")
    kind, words = formats.get(str(record.get("format")), ("", ""))
    if words:
        return None if kind == name else words
    for mark, kind, words in FOLDERS:
        if any(fnmatch(each, mark) for each in names):
            return None if kind == name else words
    images = (f for _, _, files in islice(os.walk(root), WALKED) for f in files)
    if name != "folder" and any(f.lower().endswith(PICTURES) for f in images):
        return "a folder of images: data.source=folder, or pack them by scripts/prepare_data.py"
    return None


def check_not_inside(out: Path, path: str | Path | None) -> None:
    """`UserError` if the output would lie among the data at `path`."""
    if path is None:
        return
    data, place = (Path(os.path.realpath(p)) for p in (path, out))
    if data in (place, *place.parents):
        raise UserError(f"OUT {out} lies inside the data {path}; choose another OUT")


def add_source_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--data --path --resolution --split, for `open_source_of`."""
    add = parser.add_argument
    add("--data", choices=SOURCES, required=required, help="kind of the images, as data.source")
    add("--path", type=cli.path, help="folder of the images, as data.path")
    add("--resolution", type=cli.positive, default=256, help="side of the images, in pixels")
    add("--split", default="all", help="part of the images, as data.split; digits: train or test")


def open_source_of(args: argparse.Namespace) -> Source:
    """The source that the arguments name."""
    if args.path and not source_class(args.data, args.split).needs_path:
        raise UserError(f"--path {args.path}: --data {args.data} reads no folder; leave it out")
    return open_source(args.data, args.path, args.resolution, args.split)
