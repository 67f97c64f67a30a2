"""Data sets of several files: which of them belong to a part (split) of the data."""

import re
from pathlib import Path

from models.checks.errors import UserError, printable
from utils.cli import SourceWords
from utils.data.listing import natural_key

SPLITS = ("all", "train", "validation", "test")
# "train-00000-of-00010.parquet", "val_3.tar", "test/0.parquet": the part of a file, by its name
PART = re.compile(r"(train|training|val|valid|validation|dev|test|testing)(?![a-z0-9])", re.I)
SAME = {"training": "train", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "dev"), "validation"
)
OF = re.compile(r"[0-9]+-of-([0-9]+)$")
NUMBER = re.compile(r"(.*?)([0-9]+)", re.S)


def find_shards(root: Path, ending: str, split: str, words: SourceWords) -> list[Path]:
    """The files with this ending below a folder (or the one file `root`) that are of the part
    `split`, in natural order. `UserError` if there is none, or if "all" would mix parts."""
    if root.is_file():
        return [root]
    files = [file for file in root.rglob(f"*{ending}") if _is_visible(file.relative_to(root))]
    files = sorted((f for f in files if f.is_file()), key=lambda f: natural_key(f.as_posix()))
    if not files:
        raise UserError(f"no {ending} files in {root}; give their folder")
    parts = {file: _part_of(file.relative_to(root)) for file in files}
    known = sorted({part for part in parts.values() if part})
    if split == "all":
        if len(set(parts.values())) > 1:
            kinds = [*known, *(["other files"] if "" in parts.values() else [])]
            text = f"{root} holds parts of a data set: {', '.join(kinds)}"
            first = "train" if "train" in known else known[0]
            raise UserError(f"{text}; choose one: {words.split.format(first)}")
        return files
    chosen = [file for file, part in parts.items() if part == split]
    if not chosen:
        every = words.split.format("all")
        text = f"{words.split.format(split)}: the files in {root} name"
        raise UserError(f"{text} {', '.join(known) or 'no parts'}; correct it, or give {every}")
    return chosen


def _is_visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _part_of(path: Path) -> str:
    """The part that a file's name, or a folder above it, begins with; "" for none."""
    for name in reversed(path.parts):
        if found := PART.match(name):
            return SAME.get(found[1].lower(), found[1].lower())
    return ""


def are_numbered(files: list[Path]) -> bool:
    """Whether names differ in a number alone, which counts 1 by 1: shards, and not one a class."""
    found = [NUMBER.fullmatch(re.sub(r"-of-[0-9]+$", "", file.stem)) for file in files]
    matches = [match for match in found if match]
    numbers = sorted(int(match[2]) for match in matches)
    kinds = {(match[1], len(match[2])) for match in matches}
    counted = numbers == [*range(numbers[0], numbers[0] + len(files))] if numbers else False
    return len(matches) == len(files) and len(kinds) == 1 and counted


def notes_on_missing(files: list[Path]) -> list[str]:
    """A sentence if there are fewer files than one of their names says: train-00000-of-00010."""
    found = [OF.search(file.stem) for file in files]
    total = sum(
        {(f.parent, m.string[: m.start()]): int(m[1]) for f, m in zip(files, found) if m}.values()
    )
    if not all(found) or total <= len(files):
        return []
    return [
        f"{len(files)} of the {total} files that the names count are here: the others are missing"
    ]


def short_name(file: Path, root: Path) -> str:
    """A shard as keys and messages call it: its path below the data, without the ending."""
    name = file.relative_to(root) if file != root else Path(file.name)
    return printable(name.with_suffix("").as_posix())
