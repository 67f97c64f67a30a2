"""The class of each image: files of labels in every layout that is known, and class numbers.

A file of labels is JSON (dataset.json of EDM's and REPA's tools, a mapping, or a list of objects),
JSON lines with `file_name`, a table (csv, tsv) with or without a header, lines of `name label`, or
a list of labels alone in the order of the images' names, as ImageNet's validation list is.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.checks.errors import UserError, printable, shown
from models.checks.file_kinds import what_is
from utils.cli import SETTINGS, SourceWords
from utils.data.listing import is_image_name, natural_key

MOST_CLASSES = 1_000_000  # a larger label is no class number
MOST_UNSHARED = 10  # images that may all be of different classes
# values of data.labels, beside the path of a file
AUTO, FOLDERS, ONE_CLASS = "auto", "folder", "none"
# Names of columns, in lower case, the ones to be preferred first.
NAME_FIELDS = ("file_name", "filename", "file", "path", "filepath", "file_path", "image_path")
NAME_FIELDS += ("img_path", "relative_path", "filenames", "filepaths", "image_file", "image", "img")
NAME_FIELDS += ("image_name", "name", "imageid", "image_id", "id")
LABEL_FIELDS = ("label", "labels", "class", "class_id", "label_id", "class_index", "class_idx")
LABEL_FIELDS += ("target", "y", "category", "category_id", "class_name", "label_name")
LABEL_FIELDS += ("fine_label", "synset", "wnid", "predictionstring")
WHOLE = re.compile(r"[+-]?[0-9]{1,15}(\.0*)?")  # a label that is a number
ILSVRC = re.compile(r"(?:^|/)ILSVRC2012_(?:val|test)_([0-9]{8})\.[A-Za-z]+$")
UNKNOWN = "a binary file of no known kind"  # of `what_is`
KINDS = "JSON, JSON lines, a table (csv, tsv), or lines of `name label`"

Label = int | str  # a class number, or the name of a class
# of each name; or without names, in their order; None = all images are one class
Given = dict[str, Label] | list[Label] | None


class IncompleteError(UserError):
    """Labels of some of the images, but not of all."""


class Labels(NamedTuple):
    """Of the images of a data set, in their order."""

    labels: np.ndarray  # (N,) int64: 0, 1, ... without a gap
    classes: list[str]
    notes: list[str]


def one_class(num: int, name: str = ".") -> Labels:
    """All `num` images in one class."""
    return Labels(np.zeros(num, dtype=np.int64), [name], [])


def number_classes(labels: np.ndarray, names: Sequence[str] | None, where: object) -> Labels:
    """Labels (N,) int64 as class numbers 0, 1, ... without a gap, the names of these classes, and
    notes for `Source.notes`: a class without an image would be sampled but never trained.

    `names`: of label 0, 1, ...; None = the labels are the names. `where`: their file. `UserError`
    for a label that is out of range.
    """
    end = MOST_CLASSES if names is None else len(names)
    wrong = labels[(labels < 0) | (labels >= end)]
    if len(wrong):
        text = f"{where} holds the label {wrong[0]}: expected 0 .. {end - 1}"
        raise UserError(f"{text}; correct the labels")
    used = np.unique(labels)
    classes = [str(label) if names is None else str(names[label]) for label in used.tolist()]
    if len(set(classes)) < len(classes):
        double = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{where}: two classes are called {printable(double)}; rename one")
    if len(used) == (int(used[-1]) + 1 if names is None else end):
        return Labels(labels, classes, [])
    without = next(label for label, found in enumerate([*used.tolist(), -1]) if label != found)
    note = (
        f"{where}: no image has the label {without}; the {len(used)} labels in use, {used[0]} .. "
        f"{used[-1]}, are numbered 0 .. {len(used) - 1} in their order"
    )
    return Labels(np.searchsorted(used, labels), classes, [note])


def name_classes(names: Sequence[str]) -> Labels:
    """Labels (N,) that are names of classes, numbered in natural order."""
    classes = sorted(set(names), key=natural_key)
    number = {name: i for i, name in enumerate(classes)}
    return Labels(np.array([number[name] for name in names], dtype=np.int64), classes, [])


def labels_in_file(path: Path, names: Sequence[str], words: SourceWords = SETTINGS) -> Labels:
    """`read_labels` of a file; `UserError` if it is absent or cannot be read."""
    given = words.labels.format(path)
    if not path.is_file():
        found = what_is(path)
        why = "no such file" if found == "absent" else f"it is {found}, expected a file"
        known = f"{AUTO}, {FOLDERS}, {ONE_CLASS}, or a file of labels: {KINDS}"
        raise UserError(f"{given}: {why}; correct the path (known: {known})")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); repair it") from None
    # text in another encoding looks like nothing that is known
    if (found := what_is(path)) not in ("a JSON file", "a text file", UNKNOWN):
        raise UserError(f"{path} is {found}, expected labels: {KINDS}; write them as one")
    return read_labels(data, path, names, words)


def read_labels(
    data: bytes, where: object, names: Sequence[str], words: SourceWords = SETTINGS
) -> Labels:
    """The labels of the images `names` in the content of a file of labels. Names may have slashes
    of either kind, other folders in front, or another ending; labels of other images are left out.

    `where`: the file, for messages. `UserError` if an image has no label, or one is no class.
    """
    given = _parse(data, where)
    if given is None:
        return one_class(len(names), "0")
    labels, notes = (
        _in_order(given, names, where)
        if isinstance(given, list)
        else _join(given, names, where, words)
    )
    found = number_labels(labels, where)
    if len(found.classes) == len(names) > MOST_UNSHARED:
        notes.append(f"{where}: every image is a class of its own; are these numbers of images?")
    return found._replace(notes=[*notes, *found.notes])


def number_labels(labels: Sequence[Label], where: object) -> Labels:
    """Labels that are numbers, or names of classes, as 0, 1, ... without a gap; `UserError` if some
    are numbers and others names."""
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels):
        return number_classes(np.array(numbers, dtype=np.int64), None, where)
    if numbers:
        name = next(label for label in labels if isinstance(label, str))
        text = f"{where} holds the number {numbers[0]} and the name {printable(name)} as labels"
        raise UserError(f"{text}; give all labels as numbers, or all as names")
    return name_classes([str(label) for label in labels])


# --------------------------------------------------------------------------------------
# What a file holds.


def _parse(data: bytes, where: object) -> Given:
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        known = f"expected labels: {KINDS}"
        # what begins as JSON does is meant as such
        what = "valid JSON" if data.lstrip().startswith((b"{", b"[")) else "text in UTF-8"
        raise UserError(f"{where} is no {what} ({error}); {known}; correct it") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].lstrip().startswith(("{", "[")):
        return _from_json(_load_json(text, lines, where), where)
    if not lines:
        raise UserError(f"{where} is no valid JSON and no table of labels: it is empty")
    return _from_table(lines, where)


def _load_json(text: str, lines: Sequence[str], where: object) -> Any:
    """The one value of a JSON text, or the list of those of its lines."""
    several = len(lines) > 1 and lines[0].strip().endswith("}") and lines[1].startswith("{")
    try:
        return [json.loads(line) for line in lines] if several else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no valid JSON ({error}); correct it") from None


def _from_json(record: Any, where: object) -> Given:
    if isinstance(record, dict):
        if "images" in record and "annotations" in record:
            text = f"{where} holds annotations of objects (COCO), and an image may have several"
            raise UserError(f"{text}; write one line `name,label` for each image into a csv file")
        if "labels" in record and not _columns(record):
            record = record["labels"]
            if record is None:
                return None
            return _collect(record.items() if isinstance(record, dict) else record, where)
        if _columns(record):
            record = [record]
        elif record and all(isinstance(value, Label) for value in record.values()):
            return _collect(record.items(), where)
    if isinstance(record, list) and record:
        if isinstance(record[0], dict) and (columns := _columns(record[0])):
            name, label = columns
            rows = [row if isinstance(row, dict) else {} for row in record]
            return _collect([(row.get(name), row.get(label)) for row in rows], where)
        if isinstance(record[0], dict):
            raise _no_columns([*record[0]], where)
        return _collect(record, where)
    layouts = '{"labels": [[name, label], ...]} or objects with "file_name" and "label"'
    raise UserError(f'{where} holds no "labels" of images: expected {layouts}; correct it')


def _columns(names: Iterable[str]) -> tuple[str, str] | None:
    """Which of these names of columns holds the names, and which the labels."""
    by_lower = {str(name).strip().lower(): name for name in reversed([*names])}
    name = next((by_lower[field] for field in NAME_FIELDS if field in by_lower), None)
    label = next((by_lower[field] for field in LABEL_FIELDS if field in by_lower), None)
    return None if name is None or label is None else (name, label)


def _no_columns(found: Sequence[str], where: object) -> UserError:
    """Of a table, or of objects, without known columns."""
    columns = ", ".join(map(printable, map(str, found[:6])))
    text = f"{where} has the columns {columns}: expected one file_name and one label"
    return UserError(f"{text}; name them so")


def _from_table(lines: Sequence[str], where: object) -> Given:
    """Of lines with a separator, or with white space between the name and the label."""
    separator = next((mark for mark in "\t,;" if mark in lines[0]), None)
    try:
        rows = (
            [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
            if separator
            else [_split_line(line, where) for line in lines]
        )
    except csv.Error as error:
        raise UserError(f"{where} is no table of labels ({error}); correct it") from None
    head, width = rows[0], len(rows[0])
    for i, row in enumerate(rows):
        if len(row) != width:
            text = f"{where}: row {i + 1} has {len(row)} columns, the first {width}"
            raise UserError(f"{text}; correct it")
    if width == 1:
        skip = head[0].lower() in LABEL_FIELDS
        return [label_of(row[0], where, f"row {i + 1}") for i, row in enumerate(rows)][skip:]
    if columns := _columns(head):
        name, label = map(head.index, columns)
        first = head[label].lower() == "predictionstring"  # "n01440764 113 0 421 401 ..."
        return _collect(
            [(row[name], row[label].split()[0] if first else row[label]) for row in rows[1:]], where
        )
    if width > 2:
        raise _no_columns(head, where)
    turned = is_image_name(rows[-1][1]) and not is_image_name(rows[-1][0])
    return _collect([(row[turned], row[not turned]) for row in rows], where)


def _split_line(line: str, where: object) -> list[str]:
    """ "a 1.png red rose" => "a 1.png" and "red rose"; where no ending tells, the last word is the
    label. `UserError` for several numbers behind a name."""
    if len(words := line.split()) == 2:
        return words
    for space in re.finditer(r"\s+", line):
        name, label = line[: space.start()].strip(), line[space.end() :].strip()
        if label and is_image_name(name):
            if len(label.split()) > 1 and all(map(WHOLE.fullmatch, label.split())):
                text = f"{where} holds several numbers for {printable(name)}: {label[:30]}"
                raise UserError(f"{text}; write one label, that of the class, for each image")
            return [name, label]
    return line.rsplit(maxsplit=1)


def _collect(pairs: Any, where: object) -> dict[str, Label]:
    """{name: label} of pairs; `UserError` for what is no such pair, and for a second label."""
    by_name: dict[str, Label] = {}
    listed = not isinstance(pairs, str) and isinstance(pairs, Iterable)
    for i, pair in enumerate(pairs if listed else [pairs]):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            text = f"{where}: labels[{i}]={str(pair)[:60]}: expected [name, label]"
            raise UserError(f"{text}; correct it")
        name = clean_path(pair[0])
        label = label_of(pair[1], where, printable(name))
        if by_name.setdefault(name, label) != label:
            text = f"{where} holds two labels of {printable(name)}, {by_name[name]} and {label}"
            raise UserError(f"{text}; correct it")
    return by_name


def label_of(value: Any, where: object, what: str) -> Label:
    """A class number or the name of a class, also from a vector with a single 1; `UserError`,
    which calls the image `what`, for anything else."""
    if isinstance(value, list) and len(value) > 1 and _is_one_hot(value):
        return value.index(1)
    if isinstance(value, str) and value.strip() and not WHOLE.fullmatch(value.strip()):
        return value.strip()
    if isinstance(value, float | str) and WHOLE.fullmatch(str(value).strip()):
        value = int(float(value))
    if type(value) is int and 0 <= value < MOST_CLASSES:
        return value
    text = f"{where}: label {shown(value)[:30]} of {what}: expected 0 .. {MOST_CLASSES - 1}"
    raise UserError(f"{text}, or the name of a class; correct it")


def _is_one_hot(vector: list) -> bool:
    return (
        {*map(type, vector)} <= {int, float}
        and vector.count(1) == 1
        and (vector.count(0) == len(vector) - 1)
    )


# --------------------------------------------------------------------------------------
# Which label is whose.


def clean_path(name: str) -> str:
    """A path as other tools write it, with forward slashes and from the root of the data on."""
    return name.replace("\\", "/").removeprefix("./").lstrip("/")


def _stem(path: str) -> str:
    """A path without the ending of its last part."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def _last(path: str) -> str:
    return path.rpartition("/")[2]


WAYS: dict[str, Callable[[str], str]] = {
    "": lambda path: path,
    "names without their endings": _stem,
    "names without their folders": _last,
    "names without folders and endings": lambda path: _stem(_last(path)),
}


def _join(
    given: Mapping[str, Label], names: Sequence[str], where: object, words: SourceWords
) -> tuple[list[Label], list[str]]:
    """The label of each image, by the first of `WAYS` that finds one for all of them."""
    paths = [clean_path(name) for name in names]
    moved, at = _folders_in_front(given, paths[0])
    least = [*range(len(paths))]
    for way, short in WAYS.items():
        table: dict[str, Label | None] = {}
        for name, label in given.items():
            key = short(name.removeprefix(moved))
            table[key] = label if table.get(key, label) == label else None  # None: two labels
        keys = [short(path.removeprefix(at)) for path in paths]
        if len(set(keys)) < len(keys):
            continue
        labels = [table.get(key) for key in keys]
        missing = [i for i, label in enumerate(labels) if label is None]
        if not missing:
            note = [f"{where}: the images are found by their {way}"] if way else []
            return [label for label in labels if label is not None], note
        least = min(least, missing, key=len)
    text = f"{where} has no label for {printable(names[least[0]])} ({len(least)} such of"
    text = f"{text} {len(names)} images)"
    kind = UserError if len(least) == len(names) else IncompleteError
    give = f"{words.labels.format(ONE_CLASS)} for one class"
    give += f", or {words.labels.format(FOLDERS)} if the folders are the classes"
    raise kind(f"{text}; complete it, or give {give}")


def _folders_in_front(given: Mapping[str, Label], path: str) -> tuple[str, str]:
    """The folders that the file's names have and an image's path lacks, and the other way round:
    "images/" and "" where the file names images/0/1.png and the path is 0/1.png."""
    if path in given:
        return "", ""
    longer = next((name for name in given if name.endswith(f"/{path}")), path)
    shorter = next((name for name in given if path.endswith(f"/{name}")), path)
    return longer.removesuffix(path), path.removesuffix(shorter)


def _in_order(
    labels: list[Label], names: Sequence[str], where: object
) -> tuple[list[Label], list[str]]:
    """The label of each image in a list that names none: by ILSVRC's numbers in the names, else in
    the natural order of the names, which must be as many, in one folder."""
    numbers = [int(found[1]) for found in map(ILSVRC.search, names) if found]
    if len(numbers) == len(names) and 0 < min(numbers) <= max(numbers) <= len(labels):
        note = f"{where}: line n is taken for ILSVRC2012_..._n"
        if all(isinstance(label, int) for label in labels):
            note += (
                "; if these are the numbers of the devkit (1 .. 1000), their order is not that of "
                "the synsets (n01440764, ...), by which classes are numbered elsewhere"
            )
        return [labels[number - 1] for number in numbers], [note]
    if len(labels) != len(names) or len({name.rpartition("/")[0] for name in names}) > 1:
        text = f"{where} holds {len(labels)} labels without names, for {len(names)} images"
        raise UserError(f"{text}; give `name label` in each line")
    order = sorted(range(len(names)), key=lambda i: natural_key(names[i]))
    found: list[Label] = [0] * len(names)
    for label, i in zip(labels, order):
        found[i] = label
    return found, [f"{where} names no images: its lines are taken in the order of their names"]
