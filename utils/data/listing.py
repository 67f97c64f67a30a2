"""What a folder of pictures holds, or an archive: one rule for training, for evaluation, and for
all that looks into them. Imports no torch.

Names that begin with a dot are hidden, files and folders, and so is `SYSTEM`. Links to folders are
followed; one back to a folder above it ends there, and of several ways to a folder below one class
the first counts. What is no image by its name, or no file (a broken link, a FIFO, a socket), is
ignored, counted, and said in `Listing.ignored_line`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import NamedTuple

from models.checks.errors import UserError, printable
from models.checks.file_kinds import what_is
from utils.data.decoding.formats import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS, is_read, why_missing

LABELS = "dataset.json"  # in the folder itself: the labels of EDM's and REPA's tools, a known file
MOST_KINDS = 8  # of ignored things that are named in a line
SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN"}  # of macOS, Synology and Windows
NUMBERS = re.compile(r"([0-9]+)")
IGNORED = "ignored: "  # how that line begins

# kinds of what is ignored that are no endings, with {} for the letter of the plural
HIDDEN_FILE, HIDDEN_FOLDER = "hidden file{}", "hidden folder{}"
LOOP, AGAIN = "link{} back to a folder above", "link{} to a folder that counts already"
NO_ENDING = "file{} without an ending"


class Ignored(NamedTuple):
    kind: str  # one of the above, ".heic", or "FIFO{}"
    path: str  # below the folder that was listed


@dataclass
class Listing:
    """The images of a folder or archive as paths below `root`, with forward slashes: `flat` in the
    root itself, `per_class` below each visible folder in it. The folders are in natural order, the
    paths of each list sorted as texts: the order of training."""

    root: Path
    flat: list[str] = field(default_factory=list)
    per_class: dict[str, list[str]] = field(default_factory=dict)
    ignored: list[Ignored] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.flat) + sum(map(len, self.per_class.values()))

    def in_natural_order(self) -> list[str]:
        """All images, 2.png before 10.png, whatever the folders mean: the order of evaluation."""
        return sorted(chain(self.flat, *self.per_class.values()), key=natural_key)

    def require_images(self, remedy: str) -> None:
        """`UserError` if there is no image; `remedy`, unless there are pictures to convert."""
        if not len(self):
            text = f"no images in {self.root}: looked for {', '.join(IMAGE_EXTENSIONS)}"
            raise UserError(f"{text}, also in subfolders; {self.unread() or remedy}")

    def unread(self, folder: str = "") -> str:
        """What to do about the pictures below a folder of the root, or below the root, that are of
        no kind that is read; "" if there are none."""
        inside = f"{folder}/" if folder else ""
        found = [each for each in self.ignored if each.path.startswith(inside)]
        if missing := why_missing(each.kind for each in found):
            return missing
        paths = [path for kind, path in found if kind in UNREAD_EXTENSIONS]
        first = printable(min(paths, default=""))
        return f"convert its {len(paths)} other pictures to PNG (first {first})" if paths else ""

    def ignored_line(self) -> str:
        """What was passed over, by kind, the most frequent first; "" if nothing was."""
        if not self.ignored:
            return ""
        counts = Counter(kind for kind, _ in self.ignored).most_common()
        parts = [f"{n} {kind.format('s' * (n > 1))}" for kind, n in counts[:MOST_KINDS]]
        if others := sum(n for _, n in counts[MOST_KINDS:]):
            parts.append(f"{others} others")
        first = min(path for kind, path in self.ignored if kind == counts[0][0])
        line = f"{IGNORED}{', '.join(parts)} below {self.root} (first {first})"
        missing = why_missing(kind for kind, _ in counts)
        return printable(f"{line}; {missing}" if missing else line)


def list_images(root: Path) -> Listing:
    """All images below a folder; `UserError` for a folder in it that cannot be listed."""
    found = Listing(root)
    for top, images in _walk(root, found.ignored):
        (found.per_class.setdefault(top, []) if top else found.flat).extend(images)
    for images in (found.flat, *found.per_class.values()):
        images.sort()
    return found


def list_names(root: Path, names: Iterable[str]) -> Listing:
    """All images of an archive, by the names in it; those that end in a slash are folders."""
    found, hidden = Listing(root), set()
    for name in names:
        *folders, last = name.split("/")
        visible = list(takewhile(lambda folder: not _is_hidden(folder), folders))
        if len(visible) < len(folders):
            hidden.add("/".join(folders[: len(visible) + 1]))
            continue
        images = found.per_class.setdefault(folders[0], []) if folders else found.flat
        if not (kind := HIDDEN_FILE if _is_hidden(last) else _kind_of(last)):
            images.append(name)
        elif last and name != LABELS:
            found.ignored.append(Ignored(kind, name))
    found.ignored += (Ignored(HIDDEN_FOLDER, folder) for folder in sorted(hidden))
    found.per_class = dict(sorted(found.per_class.items(), key=lambda item: natural_key(item[0])))
    for images in (found.flat, *found.per_class.values()):
        images.sort()
    return found


def holds_images(root: Path, most: int) -> bool:
    """Whether one of the first `most` folders from `root` downwards holds an image; False where one
    cannot be listed."""
    try:
        return any(images for _, images in islice(_walk(root, []), most))
    except UserError:
        return False


def _walk(root: Path, ignored: list[Ignored]) -> Iterator[tuple[str, list[str]]]:
    """For each folder from `root` downwards: the visible folder in the root that it lies below, ""
    for the root itself, and its own images. Fills `ignored`."""
    # a link to one of the folders above would never end
    above = frozenset(_identity(each) for each in (root, *Path(os.path.realpath(root)).parents))
    folders, images = _scan(root, "", ignored)
    yield "", images
    for top in sorted(folders, key=natural_key):
        seen: set[tuple[int, int]] = set()
        todo = [(top, above)]
        while todo:
            folder, path_to_it = todo.pop()
            identity = _identity(root / folder)
            if identity in path_to_it or identity in seen:
                ignored.append(Ignored(LOOP if identity in path_to_it else AGAIN, folder))
                continue
            seen.add(identity)
            folders, images = _scan(root, folder, ignored)
            yield top, images
            todo += [(each, path_to_it | {identity}) for each in sorted(folders, reverse=True)]


def _scan(root: Path, folder: str, ignored: list[Ignored]) -> tuple[list[str], list[str]]:
    """Paths below `root` of the visible folders and of the images in one folder."""
    folders, images = [], []
    try:
        with os.scandir(root / folder) as opened:
            entries = list(opened)
    except OSError as error:
        text = f"cannot list {root / folder}: {error.strerror}; repair or remove it"
        raise UserError(text) from error
    for entry in entries:
        path = f"{folder}/{entry.name}" if folder else entry.name
        is_folder = _is_folder(entry)
        if _is_hidden(entry.name):
            ignored.append(Ignored(HIDDEN_FOLDER if is_folder else HIDDEN_FILE, path))
        elif is_folder:
            folders.append(path)
        elif not (kind := _why_ignored(entry)):
            images.append(path)
        elif path != LABELS:
            ignored.append(Ignored(kind, path))
    return folders, images


def _why_ignored(entry: os.DirEntry) -> str:
    """The kind of what is no folder and no image; "" for an image."""
    if not _is_file(entry):
        link = entry.is_symlink() and not os.path.exists(entry.path)
        return "broken link{}" if link else f"{what_is(entry.path).split(' ', 1)[-1]}{{}}"
    return _kind_of(entry.name)


def _kind_of(name: str) -> str:
    """The kind of a file that is no image by its name; "" for an image."""
    ending = os.path.splitext(name)[1].lower()
    # braces in a name would be read as a place for the plural
    return "" if is_read(ending) else ending.translate({ord("{"): "(", ord("}"): ")"}) or NO_ENDING


def _is_hidden(name: str) -> bool:
    """Also the folders that systems add, of metadata, thumbnails and what was deleted."""
    return name.startswith(".") or name in SYSTEM


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; repair or remove it") from error
    return found.st_dev, found.st_ino


def natural_key(name: str) -> tuple:
    """Sort key: 2.png before 10.png."""
    parts: list = NUMBERS.split(name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name, or its path."""
    name = name.rsplit("/", 1)[-1]
    return not _is_hidden(name) and not _kind_of(name)
