"""Files on disk: written atomically, made durable, hashed, read as JSON or lines, locked.

A writer leaves the old file or the new one, whatever kills it. User mistakes are `UserError`s.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from models.errors import UserError

TEXT = ("utf-8", "surrogateescape")  # file names may hold bytes that are no UTF-8
LOCK_SECONDS = 5  # how long the workers of a killed command may take to let go of their folder


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Replace a file by text, bytes, or what `content(file)` writes; a kill leaves the old one or
    the new one, and so does a power cut. Only one process may write a path at a time."""
    # one name for all: the draft of a killed process, which may be large, is overwritten
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted by path."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def sync_tree(folder: Path) -> None:
    """`sync` of a folder and of everything below it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Make a file or folder durable: its bytes reach the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_disk(out: Path, need: int) -> None:
    """Say how many bytes are to come, and how many there is room for; `UserError` if too few."""
    existing, free = free_disk(out)
    sizes = f"{format_bytes(need)} still to write, {format_bytes(free)} free at {existing}"
    print(sizes, flush=True)
    if need > free:
        raise UserError(f"not enough disk: {sizes}; free some or choose another OUT")


def free_disk(path: Path) -> tuple[Path, int]:
    """The nearest existing folder to `path`, and the free bytes there."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    return place, shutil.disk_usage(place).free


def format_bytes(num_bytes: float) -> str:
    """Bytes in words: 3.1 GiB, 12 GiB, 240 MiB, 0.25 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        value = num_bytes / size
        if value >= 1 or unit == "MiB":
            return (
                f"{value:,.0f} {unit}"
                if value >= 10
                else f"{value:.{1 if value >= 1 else 2}f} {unit}"
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One command per folder; `UserError` if another one holds it."""
    try:
        with FileLock(folder / ".lock", timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise UserError(f"another run writes {folder}; wait for it, or stop it") from None


def write_json(path: Path, value: object) -> None:
    """`write_atomically` of a value as indented JSON."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, lines: list[str]) -> None:
    """`write_atomically` of strings, one a line."""
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode(*TEXT))


def read_lines(path: Path) -> list[str]:
    """What `write_lines` wrote."""
    return path.read_bytes().decode(*TEXT).split("\n")[:-1]


def read_record(file: Path) -> dict | None:
    """A JSON object from disk; None if there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_json(path: Path, remedy: str):
    """The content of a JSON file; a missing or broken one is a `UserError` ending in `remedy`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} not found; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}); {remedy}") from error
