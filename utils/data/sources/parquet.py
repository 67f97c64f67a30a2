"""Images in parquet files, in the layout of Hugging Face's datasets: to be packed, not trained on.

A row is an image, a struct of `bytes` and `path` or the bytes alone, and its label. The columns are
found by the features that the datasets library writes into the schema, else by their names.
"""

import io
import json
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from models.checks.errors import UserError, printable
from models.checks.file_kinds import what_is
from utils.data.base import EncodedSource
from utils.data.images import UnreadableImageError
from utils.data.labels import (
    AUTO,
    FOLDERS,
    LABEL_FIELDS,
    ONE_CLASS,
    Label,
    Labels,
    label_of,
    labels_in_file,
    number_classes,
    number_labels,
    one_class,
)
from utils.data.sources.shards import SPLITS, find_shards, notes_on_missing, short_name

IMAGES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
LABELS = (*LABEL_FIELDS, "cls")
KEPT = 2  # groups of rows that a process keeps


class Columns(NamedTuple):
    """What is read of a parquet file."""

    image: str
    in_struct: bool  # whether the bytes are a field of the column `image`
    label: str | None
    names: list[str] | None  # of the classes
    others: list[str]  # columns that are not read


class ParquetSource(EncodedSource):
    """The rows of one parquet file, or of all below a folder that are of one part of the data. A
    group of rows is read at a time, so images are quick in their order alone."""

    path_may_be_file = True
    splits = SPLITS
    random_access = False
    root: Path

    def __init__(self, root: Path, resolution: int, split: str = "all") -> None:
        super().__init__(root, resolution)
        self._files = find_shards(root, ".parquet", split, self.words)
        opened = [_open(file) for file in self._files]
        self._columns = _find_columns(opened[0].schema_arrow, self._files[0])
        for file, each in zip(self._files, opened):
            if _find_columns(each.schema_arrow, file)[:4] != self._columns[:4]:
                text = f"{file} has other columns of images and labels than {self._files[0]}"
                raise UserError(f"{text}; give a folder of files of one data set")
        groups = [
            (file, group, each.metadata.row_group(group).num_rows)
            for file, each in enumerate(opened)
            for group in range(each.num_row_groups)
        ]
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self._ends) or not self._ends[-1]:
            raise UserError(f"{root} holds no rows; give other files")
        self._kept: dict[int, Any] = {}
        self.labels, self.classes, notes = self._find_labels()
        others = ", ".join(map(printable, self._columns.others[:8]))
        notes += [f"columns that are not read: {others}"] if others else []
        self.notes = [*notes, *notes_on_missing(self._files)]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find_labels(self) -> Labels:
        column, names = self._columns.label, self._columns.names
        if self.labels_from == ONE_CLASS or (self.labels_from == AUTO and column is None):
            return one_class(len(self))
        if self.labels_from == FOLDERS:
            given = self.words.labels.format(FOLDERS)
            raise UserError(f"{given}: parquet files hold no folders; leave it out, or give a FILE")
        if self.labels_from != AUTO:
            paths = [str(path) for path in self._all(f"{self._columns.image}.path")]
            return labels_in_file(Path(self.labels_from), paths, self.words)
        assert column is not None
        values = self._all(column)
        if names is None:
            labels: list[Label] = [
                label_of(str(v) if isinstance(v, bool) else v, self.root, f"row {i}")
                for i, v in enumerate(values)
            ]
            return number_labels(labels, self.root)
        if -1 in values or None in values:
            text = f"{self.root} holds images without a label, as test parts do ({column}=-1)"
            give = self.words.labels.format(ONE_CLASS)
            raise UserError(f"{text}; choose another part of the data, or give {give}")
        return number_classes(np.array(values, dtype=np.int64), names, self.root)

    def _all(self, column: str) -> list:
        """One column of all rows; of a struct's field, where there is one of that name."""
        found = []
        for file in self._files:
            values = _open(file).read(columns=[column], use_threads=False)
            rows = values.column(0).to_pylist() if values.num_columns else [None]
            if column.endswith(".path"):
                rows = [row and row["path"] for row in rows]
                if None in rows:
                    text = f"{file} holds no names of its images; labels in a file fit by these"
                    raise UserError(f"{text}; write the labels as a column beside the images")
            found += rows
        return found

    def _row(self, i: int) -> tuple[int, int, int]:
        """Of image i, the number of its file, of its group of rows, and its row in the group."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self._ends, i, side="right"))
        before = int(self._ends[number] - self._groups[number, 2])
        return int(self._groups[number, 0]), number, i - before

    def encoded(self, i: int) -> BinaryIO:
        _, number, row = self._row(i)
        value = self._group(number, i)[row].as_py()
        data = value["bytes"] if self._columns.in_struct and value is not None else value
        if not data:
            reason = "no bytes of an image, only a name or nothing"
            raise UnreadableImageError(f"cannot read {self.where(i)}: {reason}", reason)
        return io.BytesIO(data)

    def _group(self, number: int, i: int) -> Any:
        """The column of the images in a group of rows."""
        if number not in self._kept:
            file, group, _ = self._groups[number].tolist()
            column = self._columns.image + ".bytes" * self._columns.in_struct
            try:
                table = _open(self._files[file]).read_row_group(
                    group, columns=[column], use_threads=False
                )
            except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
                reason = f"damaged: {error}".splitlines()[0]
                raise UnreadableImageError(
                    f"cannot read {self.where(i)}: {reason}", reason
                ) from None
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[number] = table.column(0)
        return self._kept[number]

    def where(self, i: int) -> str:
        return f"row {self.key(i)} of {self.root}"

    def key(self, i: int) -> str:
        """File and number of the row in it."""
        file, _, _ = self._row(i)
        rows_before = int(self._groups[self._groups[:, 0] < file, 2].sum())
        return f"{short_name(self._files[file], self.root)}/{i - rows_before:06d}"

    def files(self) -> list[Path]:
        """The parquet files."""
        return self._files


def _open(file: Path):
    """A parquet file; `UserError` if it is none, or damaged."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("parquet files need pyarrow; run: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        found = what_is(file)
        damage = ", cut short or damaged" if "parquet" in found else ", expected a parquet file"
        text = f"{file} cannot be read as parquet ({why}): it is {found}{damage}"
        raise UserError(f"{text}; copy or make it again") from None


def _find_columns(schema: Any, file: Path) -> Columns:
    """Which columns of a schema are the image and the label."""
    features = _features(schema)
    kinds = {name: f.get("_type") for name, f in features.items() if isinstance(f, dict)}
    types = {field.name: field.type for field in schema}
    structs = [name for name, kind in types.items() if _has_bytes(kind)]
    binary = [name for name, kind in types.items() if str(kind) in ("binary", "large_binary")]
    images = [name for name in structs + binary if kinds.get(name) == "Image"]
    image = _choose(images or structs or binary, IMAGES, file, "images", list(types))
    label, names = None, None
    if classes := [name for name, kind in kinds.items() if kind == "ClassLabel" and name in types]:
        label = _choose(classes, LABELS, file, "classes", list(types))
        names = features[label].get("names")
        names = [*map(str, names.values() if isinstance(names, dict) else names or [])] or None
    elif named := [name for name in types if name.lower() in LABELS]:
        label = min(named, key=lambda name: LABELS.index(name.lower()))
        if str(types[label]).startswith(("list", "large_list", "struct", "fixed_size_list", "map")):
            text = f"{file}: the column {label} holds {types[label]}, and not one class an image"
            raise UserError(f"{text}; write a column of one number or name")
    others = [name for name in types if name not in (image, label)]
    return Columns(image, image in structs, label, names, others)


def _features(schema: Any) -> dict:
    """The features that the datasets library keeps in the schema; {} if there are none."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_bytes(kind: Any) -> bool:
    """Whether a type is a struct with a field `bytes`."""
    named = str(kind).startswith("struct")
    return named and any(kind.field(i).name == "bytes" for i in range(kind.num_fields))


def _choose(found: list[str], names: tuple[str, ...], file: Path, what: str, all: list[str]) -> str:
    """The only column found, or the first one of `names`; `UserError` if neither tells."""
    known = sorted((n for n in found if n.lower() in names), key=lambda n: names.index(n.lower()))
    if len(found) != 1 and not known:
        shown = ", ".join(map(printable, all[:8]))
        which = f"several columns of {what}" if found else f"no column of {what}"
        raise UserError(
            f"{file} has {which} (its columns: {shown}); expected one, called {names[0]}, with the "
            "bytes of image files" if what == "images" else
            f"{file} has {which} (its columns: {shown}); rename the one to be read to {names[0]}"
        )  # fmt: skip
    return found[0] if len(found) == 1 else known[0]
