"""Which class each image below a folder, or in an archive, belongs to: by labels, or its folder."""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from models.checks.errors import UserError, printable
from utils.cli import SourceWords
from utils.data.labels import (
    AUTO,
    FOLDERS,
    ONE_CLASS,
    IncompleteError,
    Labels,
    labels_in_file,
    one_class,
    read_labels,
)
from utils.data.listing import LABELS, Listing, is_image_name

# Folders of these names hold parts of a data set, each with the class folders.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
PART = re.compile(rf"({'|'.join(PARTS)})([-_ ]?([0-9]+|set|images|data))*", re.I)
# Folders of these names lie beside the images and belong to them; none of them is a class.
COMPANIONS = {"label", "labels", "mask", "masks", "annotation", "annotations", "gt", "depth"}
COMPANIONS |= {"segmentation", "segmentations", "bbox", "bboxes", "thumbnail", "thumbnails"}
SIBLINGS = 100  # entries beside a folder that are looked at
TABLES = (".csv", ".tsv", ".jsonl", ".json")  # files that may hold labels


class Classes:
    """The images of a `Listing` as classes, and what is odd about its folders.

    `labels_from`: as of `Source`. `read`: the content of a file, by its path below the listing's
    root; None if there is no such file.
    """

    def __init__(
        self,
        listing: Listing,
        words: SourceWords,
        labels_from: str,
        read: Callable[[str], bytes | None],
        is_archive: bool = False,
    ) -> None:
        self.listing, self.words, self.labels_from, self.read = listing, words, labels_from, read
        self.root, self.is_archive = listing.root, is_archive
        what = "archive" if is_archive else "folder"
        listing.require_images(f"give the {what} of the class folders")
        self.folders = list(listing.per_class)
        self.per_class = list(listing.per_class.values())
        self.flat = listing.flat

    def find(self) -> tuple[list[str], Labels]:
        """The names of the images in the order of training, and their labels; the notes say also
        what was ignored. `UserError` if an image has no label, or the folder is no data set."""
        names = sorted(name for below in self.per_class for name in below) + self.flat
        rule = self.labels_from
        if rule == ONE_CLASS:
            found = one_class(len(names))
        elif rule not in (AUTO, FOLDERS):
            found = labels_in_file(Path(rule), names, self.words)
            others = (i for i in self.listing.ignored if self.root / i.path != Path(rule))
            self.listing.ignored = [*others]
        else:
            by_record = self._by_dataset_json(names) if rule == AUTO else None
            names, found = (names, by_record) if by_record else self._by_folders()
        ignored = self.listing.ignored_line()
        return names, found._replace(notes=[*found.notes, *([ignored] if ignored else [])])

    def _by_dataset_json(self, names: list[str]) -> Labels | None:
        """The labels of a dataset.json: in the root, in the only folder with images, or beside the
        root, if it fits; None if there is none. `UserError` for a damaged one in the data."""
        filled = [name for name, images in zip(self.folders, self.per_class) if images]
        inside = [
            LABELS,
            *([f"{filled[0]}/{LABELS}"] if len(filled) == 1 and not self.flat else []),
        ]
        for path in inside:
            if (data := self.read(path)) is not None:
                file = self.root / path
                self.listing.ignored = [i for i in self.listing.ignored if i.path != path]
                return self._of_record(read_labels(data, file, names, self.words), file)
        file = self.root.absolute().parent / LABELS
        try:
            return self._of_record(read_labels(file.read_bytes(), file, names, self.words), file)
        except IncompleteError:
            raise
        except (OSError, UserError):  # none, or one that does not speak of these images
            return None

    def _of_record(self, found: Labels, file: Path) -> Labels:
        note = f"the labels are those of {file}, not the folders"
        return found._replace(notes=[*found.notes, note])

    def _by_folders(self) -> tuple[list[str], Labels]:
        classes, per_class, notes = self._classes_of_folders()
        names = [name for below in per_class for name in below]
        labels = np.repeat(np.arange(len(classes)), [len(below) for below in per_class])
        return names, Labels(labels, classes, [*notes, *self._notes_on_tables(len(classes))])

    def _classes_of_folders(self) -> tuple[list[str], list[list[str]], Iterable[str]]:
        """Class names, the images of each, and notes; `UserError` if the folder is no data set."""
        if self.flat and any(self.per_class):
            text = f"{self.root} holds images ({printable(self.flat[0])}) beside class folders"
            raise UserError(f"{text}; move them away, or give {self._labels(ONE_CLASS)}")
        if self.flat:
            return ["."], [self.flat], [] if self.is_archive else self._notes_on_siblings()
        self._refuse_what_are_no_classes()
        notes = (self._notes_on_levels(), self._notes_on_names(), self._notes_on_storage())
        return self.folders, self.per_class, [*itertools.chain(*notes)]

    def _refuse_what_are_no_classes(self) -> None:
        """`UserError` for folders that are the parts of a data set, or that hold no images."""
        root, pairs = self.root, zip(self.folders, self.per_class)
        filled = [name for name, images in pairs if images]
        parts = all(map(PART.fullmatch, filled))
        if parts and (self._nested or len(filled) > 1):
            text = f"{root} holds {' and '.join(filled)}, which are parts of a data set and no"
            raise UserError(f"{text} classes; give one of them, e.g. {self._as_path(filled[0])}")
        if len(filled) == len(self.folders):
            return
        empty = self.folders[self.per_class.index([])]
        text = f"class folder {root / empty} holds no images; "
        text += self.listing.unread(empty) or "fill or remove it"
        if len(filled) == 1:  # images beside their labels, for example
            text += f", or give the only folder with images, {self._as_path(filled[0])}"
        raise UserError(text)

    @property
    def _nested(self) -> bool:
        """Whether no class folder holds an image itself."""
        return all(name.count("/") > 1 for below in self.per_class for name in below)

    def _as_path(self, *below: str | Path) -> str:
        """How the user would give a folder below this one as the data."""
        if self.is_archive:
            return f"an archive of {printable('/'.join(map(str, below)))} alone"
        return printable(self.words.path.format(Path(self.root, *below)))

    def _labels(self, value: object) -> str:
        """How the user would say where the labels are."""
        return self.words.labels.format(value)

    def _notes_on_levels(self) -> Iterator[str]:
        """Where the classes seem to lie deeper."""
        if not self._nested:
            return
        inner = sorted({os.path.dirname(name) for below in self.per_class for name in below})
        text = f"the images lie in folders of folders ({printable(inner[0])}), and the upper ones"
        text += f" are the classes: is {self.root} one level too high?"
        if common := os.path.commonpath(inner):
            text += f" Then give {self._as_path(common)}"
        yield text

    def _notes_on_names(self) -> Iterator[str]:
        """Of class folders whose names tell that they are no classes, or that differ too little."""
        by_lower = {name.casefold(): name for name in self.folders}
        if twins := [name for name in self.folders if by_lower[name.casefold()] != name]:
            other = by_lower[twins[0].casefold()]
            yield f"class folders {twins[0]} and {other} differ in case alone"
        beside = [name for name in self.folders if name.lower() in COMPANIONS]
        others = [name for name in self.folders if name not in beside]
        if beside and len(others) == 1:
            yield (
                f"{' and '.join(beside)} would be trained on as classes of their own; if they "
                f"only belong to the images in {others[0]}, give {self._as_path(others[0])}"
            )

    def _notes_on_storage(self) -> Iterator[str]:
        """Of folders with numbers of one length for names, as tools make them to store images."""
        lengths = {len(name) for name in self.folders}
        digits = all(name.isascii() and name.isdigit() for name in self.folders)
        if self.labels_from == AUTO and digits and len(lengths) == 1 and min(lengths) > 1:
            first, last, num = self.folders[0], self.folders[-1], len(self.folders)
            yield (
                f"the folders {first} .. {last} look like storage and not like classes, and no "
                f"{LABELS} has labels: they count as {num:,} classes; give "
                f"{self._labels('FILE')} with the labels, {self._labels(ONE_CLASS)} for one class, "
                f"or {self._labels(FOLDERS)} if they are classes"
            )

    def _notes_on_tables(self, num_classes: int) -> Iterator[str]:
        """Of a file beside images of one class, or of storage folders, that may hold labels."""
        storage = bool([*self._notes_on_storage()])
        if self.labels_from != AUTO or not (num_classes == 1 or storage):
            return
        places = {"", *(self.folders if num_classes == 1 else [])}
        beside = [i for i in self.listing.ignored if os.path.dirname(i.path) in places]
        texts = [each for each in beside if each.kind == ".txt"]
        tables = [each for each in beside if each.kind in TABLES] or texts * (len(texts) == 1)
        if tables and len(tables) < len(self.listing):  # not one for each image
            path = printable(min(each.path for each in tables))
            give = self._labels(path if self.is_archive else self.root / path)
            give = f"unpack it and give {give}" if self.is_archive else f"give {give}"
            yield f"{path} beside the images is not read; if it holds their labels, {give}"

    def _notes_on_siblings(self) -> Iterator[str]:
        """Of other folders with images beside this one, which is then perhaps a class folder."""
        root = Path(os.path.realpath(self.root))
        if root.name.lower() in PARTS:
            return
        found = []
        with suppress(OSError), os.scandir(root.parent) as entries:
            for entry in itertools.islice(entries, SIBLINGS):
                own = entry.name == root.name or entry.name.lower() in PARTS
                if not own and not entry.name.startswith(".") and _holds_images(entry):
                    found.append(entry.name)
        if found:
            yield (
                f"{printable(min(found))} beside {root.name} holds images too: if these are "
                f"classes, {self.root} is one level too low; give {self._as_path(root.parent)}"
            )


def _holds_images(entry: os.DirEntry) -> bool:
    """Whether a folder holds an image itself, among its first files."""
    try:
        with os.scandir(entry) as files:
            return any(is_image_name(file.name) for file in itertools.islice(files, SIBLINGS))
    except OSError:  # no folder, or not to be read
        return False
