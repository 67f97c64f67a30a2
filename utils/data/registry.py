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
from pathlib import Path
from typing import TYPE_CHECKING

from models.checks.errors import UserError, shown
from models.checks.file_kinds import what_is
from utils import cli
from utils.cli import FLAGS, SETTINGS
from utils.data.listing import holds_images
from utils.files import read_record

if TYPE_CHECKING:
    from utils.data.base import Source

# name of data.source: (module, class)
SOURCES = {
    "digits": ("utils.data.sources.toy", "DigitsSource"),
    "folder": ("utils.data.sources.folder", "FolderSource"),
    "packed": ("utils.data.sources.packed", "PackedSource"),
    "hdf5": ("utils.data.sources.hdf5", "Hdf5Source"),
    "synthetic": ("utils.data.sources.toy", "SyntheticSource"),
}

MOST_RESOLUTION = 8192  # pixels
RESOLUTION = 256  # pixels, where none is asked for and the data have none of their own
# What to do with a file in the place of a folder: words of `what_is`, or a part of its name. In all
# such words, {NAME} is how the user asks for the source NAME.
REMEDIES = (
    (".parquet", "export its images into class folders"),
    (".pt", "give the folder of the images"),
    ("archive", "unpack it, and give the folder"),
    ("empty zip", "it holds nothing"),
    (".tar", "unpack it, and give the folder"),
    ("HDF5", "give its folder, with {hdf5}"),
    ("NumPy", "write its images into class folders"),
    ("image", "give its folder, with {folder}"),
    ("JSON", "give its folder"),
)
# What a folder seems to be: names in it, the source that reads it, words.
FOLDERS = (
    ("images.h5", "hdf5", "the official HDF5 layout: {hdf5}"),
    ("checkpoints", "", "the folder of a run"),
    ("*.safetensors", "", "a folder of weights"),
    ("*.parquet", "", "parquet files: export their images into class folders"),
    ("*.arrow", "", "Arrow files: export their images into class folders"),
    ("*.tar", "", "tar archives (webdataset): unpack them into class folders"),
    ("*.zip", "", "zip archives: unpack them"),
)
WALKED = 100  # folders in which images are looked for


def source_class(name: str, split: str = "all", words: cli.SourceWords = SETTINGS) -> type[Source]:
    """The class of a source; `UserError` for an unknown name, or a split that it does not have."""
    if name not in SOURCES:
        given = words.source.format(name)
        raise UserError(f"{given}: expected one of {', '.join(SOURCES)}")
    module, cls = SOURCES[name]
    cls = getattr(import_module(module), cls)
    if split not in cls.splits:
        known = ", ".join(cls.splits)
        raise UserError(f"{words.split.format(split)}: the source {name} has {known}")
    return cls


def open_source(
    name: str,
    path: str | Path | None = None,
    resolution: int | None = None,
    split: str = "all",
    words: cli.SourceWords = SETTINGS,
) -> Source:
    """Open a data set; `UserError` if it is not there, in the words of the program's arguments.
    `path` is ignored where none is needed; without a `resolution`, it is the data's own, or
    `RESOLUTION`."""
    cls = source_class(name, split, words)
    asked = RESOLUTION if resolution is None else resolution
    if not (isinstance(asked, int) and 1 <= asked <= MOST_RESOLUTION):
        given = words.resolution.format(shown(asked))
        raise UserError(f"{given}: expected 1 .. {MOST_RESOLUTION} pixels")
    if not cls.needs_path:
        return _opened(cls, None, asked, split, words)
    kind = "file or folder" if cls.path_may_be_file else "folder"
    if path is None:
        given = words.path.format("DIR")
        raise UserError(f"the source {name} needs {given}, the {kind} of the images")
    root = Path(cli.expand_path(str(path)))
    if not (os.path.isdir(root) or (cls.path_may_be_file and os.path.isfile(root))):
        raise UserError(f"{words.path.format(path)}: {_what_is_wrong(root, kind, words)}")
    try:
        if resolution is None:
            asked = cls.own_resolution(root) or asked
        return _opened(cls, root, asked, split, words)
    except UserError as error:
        other = _folder_of_another_kind(root, name, words)
        if other is None:
            raise
        raise UserError(f"{error}; {root} looks like {other}") from None


def _opened(
    cls: type[Source], root: Path | None, resolution: int, split: str, words: cli.SourceWords
) -> Source:
    """A new source that has the words before its `__init__` raises an error."""
    source = cls.__new__(cls)
    source.words = words
    source.__init__(root, resolution, split)
    return source


def _what_is_wrong(root: Path, kind: str, words: cli.SourceWords) -> str:
    """Why `root` is not the `kind` that it should be, and what to do."""
    found = what_is(root)
    if found == "absent":
        parent = root.absolute().parent
        names = os.listdir(parent) if os.path.isdir(parent) else []
        close = difflib.get_close_matches(root.name, names, n=1)
        remedy = f"did you mean {parent / close[0]}?" if close else "correct the path"
        return f"no such {kind}; {remedy}"
    remedy = next((text for part, text in REMEDIES if part in found or part in root.name), "")
    remedy = _named(remedy, words) or f"give the {kind} of the images"
    return f"it is {found}, expected a {kind}; {remedy}"


def _named(text: str, words: cli.SourceWords) -> str:
    """A text with each {NAME} as the user asks for the source NAME."""
    return text.format(**{name: words.source.format(name) for name in SOURCES})


def _folder_of_another_kind(root: Path, name: str, words: cli.SourceWords) -> str | None:
    """What a folder seems to hold, and how to use it; None if nothing but what `name` reads."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return None
    if not names:
        return "an empty folder"
    record = read_record(root / "plan.json") or read_record(root / "meta.json") or {}
    formats = {"repae-packed-1": ("packed", "packed data: {packed}")}
    formats["repae-latents-1"] = ("", "cached latents: train with data.latents, beside data.path")
    kind, text = formats.get(str(record.get("format")), ("", ""))
    if not text:
        marks = (row for row in FOLDERS if any(fnmatch(each, row[0]) for each in names))
        _, kind, text = next(marks, ("", "", ""))
    if text:
        return None if kind == name else _named(text, words)
    if name != "folder" and holds_images(root, WALKED):
        text = "a folder of images: {folder}, or pack them by scripts/prepare_data.py"
        return _named(text, words)
    return None


def add_source_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--data --path --resolution --split, for `open_source_of`."""
    add = parser.add_argument
    add("--data", choices=SOURCES, required=required, help="kind of the images, as data.source")
    add("--path", type=cli.path, help="folder of the images, as data.path")
    side = f"side of the images, in pixels; default: that of packed data, else {RESOLUTION}"
    add("--resolution", type=cli.positive, help=side)
    add("--split", default="all", help="part of the images, as data.split; digits: train or test")


def open_source_of(args: argparse.Namespace) -> Source:
    """The source that the arguments name."""
    check_path_is_read(args)
    return open_source(args.data, args.path, args.resolution, args.split, FLAGS)


def check_path_is_read(args: argparse.Namespace) -> None:
    """`UserError` for a --path that --data makes no use of."""
    if args.path and not source_class(args.data, words=FLAGS).needs_path:
        text = f"--path {args.path}: --data {args.data} reads no folder"
        raise UserError(f"{text}; leave it out, or give the --data that it holds, e.g. folder")
