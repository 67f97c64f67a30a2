"""Every data source by its name: `SOURCES`, and `open_source`.

To add a source, write a subclass of `utils.data.base.Source` in a file of its own and add a row to
`SOURCES`. Classes are imported when they are opened: parsers use this file, and torch is slow.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch, translate
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from models.checks.errors import UserError, shown
from models.checks.file_kinds import PICKLE, what_is
from utils import cli
from utils.cli import FLAGS, SETTINGS
from utils.data.decoding.conversion import MOST_DEPTH, PLAIN, Conversion
from utils.data.labels import AUTO, FOLDERS, ONE_CLASS
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
    "zip": ("utils.data.sources.zipped", "ZipSource"),
    "tar": ("utils.data.sources.tarred", "TarSource"),
    "parquet": ("utils.data.sources.parquet", "ParquetSource"),
    "synthetic": ("utils.data.sources.toy", "SyntheticSource"),
}

MOST_RESOLUTION = 8192  # pixels
RESOLUTION = 256  # pixels, where none is asked for and the data have none of their own
PACK = "pack them (python scripts/prepare_data.py SRC OUT)"
AS_FILES = "write their images as files into class folders"
AS_PARQUET = "datasets.load_from_disk(DIR).to_parquet(FILE) makes parquet files, then"
# What is not read as it is, or by another source: patterns of names; the source that reads it, if
# one does; what it is, and what to do. In all texts, {NAME} is how the user asks for the source.
KINDS = (
    (("images.h5",), "hdf5", "the official HDF5 layout: {hdf5}"),
    (("checkpoints",), "", "the folder of a run"),
    (("*.safetensors",), "", "a folder of weights"),
    (("*.parquet",), "parquet", f"parquet files: {PACK}"),
    (("dataset_dict.json", "*.arrow"), "", f"Arrow files of save_to_disk: {AS_PARQUET} {PACK}"),
    (("*.tar",), "tar", f"tar archives (webdataset or plain): {{tar}}, or {PACK}"),
    (("*.tar.gz", "*.tgz", "*.tar.bz2", "*.tar.xz"), "", "compressed tars: unpack them to .tar"),
    (("*.zip",), "zip", "zip archives: give one of them as the path, with {zip}"),
    (("*.mdb",), "", f"an LMDB database: {AS_FILES}"),
    (("*tfrecord*", "*-?????-of-?????"), "", f"TFRecord files: {AS_FILES}, or WebDataset's tars"),
    (("data_batch_*", "batches.meta", "*.pkl", "*.pickle"), "", f"pickles (as CIFAR): {AS_FILES}"),
    (("*-ubyte", "*-ubyte.gz"), "", f"IDX files (as MNIST): {AS_FILES}"),
    (("*.npz", "*.npy"), "", f"NumPy arrays: {AS_FILES}, e.g. by PIL.Image.fromarray"),
    (("*.mat",), "", f"MATLAB files: {AS_FILES}"),
    (("*.h5", "*.hdf5"), "", f"HDF5 files of another layout than {{hdf5}} reads: {AS_FILES}"),
    (("*.rec",), "", f"RecordIO files of MXNet: {AS_FILES}"),
    (("*.beton",), "", f"FFCV files: {AS_FILES}"),
    (("*.mds", "*.mds.zstd", "chunk-*.bin"), "", f"streaming shards (MDS, LitData): {AS_FILES}"),
    (("*.7z", "*.rar"), "", "archives: unpack them, and give the folder"),
    (
        ("*.mp4", "*.avi", "*.mov", "*.mkv", "*.webm", "*.mpg"),
        *("", "videos: write their frames as files (ffmpeg -i FILE FOLDER/%06d.png)"),
    ),
)
# matches the names, in lower case, that one of these patterns does: a folder may hold a million
ANY_KIND = re.compile("|".join(translate(each) for patterns, *_ in KINDS for each in patterns))
# The same of a file in the place of a folder: words of `what_is`, and what to do.
CONTENTS = (
    ("a zip archive", "read it in place, with {zip}, or unpack it, and give the folder"),
    ("a tar archive", "read it in place, with {tar}, or unpack it, and give the folder"),
    ("NumPy", f"{AS_FILES}, e.g. by PIL.Image.fromarray"),
    ("empty zip", "it holds nothing"),
    ("archive", "unpack it, and give the folder"),
    ("PyTorch", "give the folder of the images"),
    ("pickle", AS_FILES),
    ("HDF5", "give its folder, with {hdf5}, if it is the official images.h5"),
    ("image", "give its folder, with {folder}"),
    ("JSON", "give its folder"),
)
LABELS_HELP = (
    "where the classes come from, as data.labels: folder = the folders of the images; none = one "
    "class; or a file (json, jsonl, csv, lines of `name label`); auto = dataset.json, else folder"
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
    conversion: Conversion = PLAIN,
    labels: str = AUTO,
) -> Source:
    """Open a data set; `UserError` if it is not there, in the words of the program's arguments.
    `path` is ignored where none is needed; without a `resolution`, it is the data's own, or
    `RESOLUTION`. `conversion`: of files to pixels; data that hold pixels keep theirs. `labels`: as
    data.labels."""
    cls = source_class(name, split, words)
    asked = RESOLUTION if resolution is None else resolution
    if not (isinstance(asked, int) and 1 <= asked <= MOST_RESOLUTION):
        given = words.resolution.format(shown(asked))
        raise UserError(f"{given}: expected 1 .. {MOST_RESOLUTION} pixels")
    if labels != AUTO and not cls.takes_labels:
        text = f"{words.labels.format(labels)}: the source {name} has labels of its own"
        raise UserError(f"{text}; leave it out, or give it where the data are packed")
    set_before = {"words": words, "conversion": conversion, "labels_from": labels}
    if not cls.needs_path:
        return _opened(cls, None, asked, split, set_before)
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
        return _opened(cls, root, asked, split, set_before)
    except UserError as error:
        other = _folder_of_another_kind(root, name, words)
        if other is None:
            raise
        raise UserError(f"{error}; {root} looks like {other}") from None


def _opened(
    cls: type[Source], root: Path | None, resolution: int, split: str, set_before: dict
) -> Source:
    """A new source that has these attributes before its `__init__` asks for them."""
    source = cls.__new__(cls)
    vars(source).update(set_before)
    source.__init__(root, resolution, split)
    return source


def source_of(path: Path) -> str:
    """The source that seems to read what lies at `path`: zip, tar, parquet, hdf5, else folder."""
    if path.is_file():
        _, source, _ = _kind_of([path.name])
        archives = {"a zip archive": "zip", "a tar archive": "tar"}
        return source or archives.get(what_is(path), "folder")
    _, source, _ = _kind_of(_names_in(path))
    return source if source and source != "zip" else "folder"


def _names_in(folder: Path) -> list[str]:
    """The names in a folder; also those below it, where it holds neither files of a known kind nor
    images."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    if any(_kind_of(names)) or holds_images(folder, WALKED):
        return names
    return [*names, *(name for _, _, files in islice(os.walk(folder), 1, WALKED) for name in files)]


def _kind_of(names: Sequence[str]) -> tuple[str, str, str]:
    """The first of `KINDS` that one of these names tells: the name, the source, what to do."""
    known = [name for name in names if ANY_KIND.match(name.lower())]
    for patterns, source, text in KINDS:
        for name in known:
            if any(fnmatch(name.lower(), pattern) for pattern in patterns):
                return name, source, text
    return "", "", ""


def _what_is_wrong(root: Path, kind: str, words: cli.SourceWords) -> str:
    """Why `root` is not the `kind` that it should be, and what to do."""
    found = what_is(root)
    if found == "absent":
        parent = root.absolute().parent
        names = os.listdir(parent) if os.path.isdir(parent) else []
        close = difflib.get_close_matches(root.name, names, n=1)
        remedy = f"did you mean {parent / close[0]}?" if close else "correct the path"
        return f"no such {kind}; {remedy}"
    remedy = next((text for part, text in CONTENTS if part in found), "")
    if not remedy and os.path.isfile(root):
        remedy = _kind_of([root.name])[2]
    remedy = _named(remedy, words) or f"give the {kind} of the images"
    return f"it is {found}, expected a {kind}; {remedy}"


def _named(text: str, words: cli.SourceWords) -> str:
    """A text with each {NAME} as the user asks for the source NAME."""
    return text.format(**{name: words.source.format(name) for name in SOURCES})


def _folder_of_another_kind(root: Path, name: str, words: cli.SourceWords) -> str | None:
    """What a folder seems to hold, and how to use it; None if nothing but what `name` reads."""
    if root.is_file():
        return None
    names = _names_in(root)
    if not names:
        return "an empty folder"
    record = read_record(root / "plan.json") or read_record(root / "meta.json") or {}
    formats = {"repae-packed-1": ("packed", "packed data: {packed}")}
    formats["repae-latents-1"] = ("", "cached latents: train with data.latents, beside data.path")
    kind, text = formats.get(str(record.get("format")), ("", ""))
    if not text:
        _, kind, text = _kind_of(names)
    if text:
        return None if kind == name else _named(text, words)
    if name != "folder" and holds_images(root, WALKED):
        text = "a folder of images: {folder}, or pack them by scripts/prepare_data.py"
        return _named(text, words)
    for path in (root / each for each in names[:WALKED]):
        if (found := what_is(path)) in (PICKLE, "a parquet file", "an Arrow file"):
            return f"files of another kind ({path.name} is {found}): {AS_FILES}"
    return None


def add_source_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--data --path --resolution --split --labels --exif --depth-range, for `open_source_of`."""
    add = parser.add_argument
    add("--data", choices=SOURCES, required=required, help="kind of the images, as data.source")
    add("--path", type=cli.path, help="folder of the images, as data.path")
    side = f"side of the images, in pixels; default: that of packed data, else {RESOLUTION}"
    add("--resolution", type=cli.positive, help=side)
    add("--split", default="all", help="part of the images, as data.split; digits: train or test")
    add("--labels", default=AUTO, type=labels_argument, metavar="WHERE", help=LABELS_HELP)
    add_conversion_arguments(parser)


def labels_argument(text: str) -> str:
    """Type of the argument --labels."""
    return text if text in (AUTO, FOLDERS, ONE_CLASS) else cli.path(text)


def add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    """--exif --depth-range, for `conversion_of`."""
    add = parser.add_argument
    add("--exif", action="store_true", help="turn pictures as their EXIF data say, as data.exif; "
        "ADM does not")  # fmt: skip
    add("--depth-range", nargs=2, type=cli.not_negative, metavar=("LO", "HI"),
        help="the values of 16-bit grey pictures that become black and white, as data.depth_range; "
        f"default: 0 {MOST_DEPTH}")  # fmt: skip


def conversion_of(args: argparse.Namespace) -> Conversion:
    """What `add_conversion_arguments` were given; `UserError` for a range without values."""
    depth = args.depth_range or []
    return conversion(args.exif, depth, " ".join(["--depth-range", *map(str, depth)]))


def conversion(exif: bool, depth_range: Sequence[int], given: str) -> Conversion:
    """`Conversion.asked`; `UserError` for a range without values, which the user has `given`."""
    if depth_range and not depth_range[0] < depth_range[1] <= MOST_DEPTH:
        raise UserError(f"{given}: expected 0 <= LO < HI <= {MOST_DEPTH}")
    return Conversion.asked(exif, depth_range)


def open_source_of(args: argparse.Namespace) -> Source:
    """The source that the arguments name."""
    check_path_is_read(args)
    how = conversion_of(args)
    return open_source(args.data, args.path, args.resolution, args.split, FLAGS, how, args.labels)


def check_path_is_read(args: argparse.Namespace) -> None:
    """`UserError` for a --path that --data makes no use of."""
    if args.path and not source_class(args.data, words=FLAGS).needs_path:
        text = f"--path {args.path}: --data {args.data} reads no folder"
        raise UserError(f"{text}; leave it out, or give the --data that it holds, e.g. folder")
