"""Files on disk: written atomically, made durable, hashed, read as JSON or lines, locked.

A writer leaves the old file or the new one, whatever kills it. User mistakes are `UserError`s.
"""

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from models.checks.errors import UserError
from models.checks.file_kinds import read_json

TEXT = ("utf-8", "surrogateescape")  # file names may hold bytes that are no UTF-8
DRAFT = ".tmp"  # end of the name of a file that is being written
LONGEST_PATH = 3800  # bytes; Linux takes 4096, and files inside have longer paths
LOCK_SECONDS = 5  # how long the workers of a killed command may take to let go of their folder


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashedFile:
    """A new file, open for writing, whose sha256 is known at once: nothing is read back.

    `error` is the first `OSError` of a write; torch.save turns it into another exception.
    """

    def __init__(self, path: Path):
        self.file, self.hash = path.open("wb"), hashlib.sha256()
        self.error: OSError | None = None

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        if self.error:
            raise self.error

    def write(self, content: bytes | memoryview) -> int:
        try:
            self.file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise
        self.hash.update(content)
        return len(content)

    def flush(self) -> None:
        self.file.flush()

    @property
    def sha256(self) -> str:
        """Of what has been written so far, in hexadecimal."""
        return self.hash.hexdigest()


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Replace a file by text, bytes, or what `content(file)` writes; a kill leaves the old one or
    the new one, and so does a power cut. Only one process may write a path at a time."""
    # one name for all: the draft of a killed process, which may be large, is overwritten
    draft = path.with_name(f".{path.name}{DRAFT}")
    try:
        draft.unlink(missing_ok=True)  # a link there would be followed
        with draft.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
        sync(draft)
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    sync(path.parent)


def sweep_drafts(folder: Path) -> None:
    """Delete the drafts that killed processes have left in a folder: see `write_atomically`."""
    for draft in folder.glob(f".*{DRAFT}"):
        if draft.is_file() and not draft.is_symlink():
            draft.unlink()


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, sorted by path."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def reason(error: OSError) -> str:
    """Why the file system refused, in words: "No space left on device: exps/a/metrics.jsonl"."""
    place = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{place}"


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
    unit, size = ("GiB", 2**30) if num_bytes >= 2**30 else ("MiB", 2**20)
    value = num_bytes / size
    digits = 0 if value >= 10 else 1 if value >= 1 else 2
    return f"{value:,.{digits}f} {unit}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One command per folder; `UserError` if another one holds it."""
    from filelock import FileLock, Timeout  # cli.py, which imports this file, needs no package

    try:
        with FileLock(folder / ".lock", timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise UserError(f"another run writes {folder}; wait for it, or stop it") from None


def write_json(path: Path, value: object) -> None:
    """`write_atomically` of a value as indented JSON."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def append_json(path: Path, value: dict) -> None:
    """Write a JSON object as one more line of a file, also behind a line that was cut short."""
    line = json.dumps(value).encode() + b"\n"
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, 2), file.read())[1] != b"\n":
            line = b"\n" + line
        file.write(line)


def read_json_lines(path: Path) -> list[dict]:
    """The JSON objects in a file that has one a line; a line that was cut short is passed over."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def write_lines(path: Path, lines: list[str]) -> None:
    """`write_atomically` of strings, one a line."""
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode(*TEXT))


def read_lines(path: Path) -> list[str]:
    """What `write_lines` wrote."""
    return path.read_bytes().decode(*TEXT).split("\n")[:-1]


def read_record(file: Path) -> dict | None:
    """A JSON object from disk; None if there is none, or none that can be read."""
    try:
        found = read_json(file, "")
    except UserError:
        return None
    return found if isinstance(found, dict) else None


def expand_path(text: str) -> str:
    """A path with `~` and `$VARIABLES` expanded, here and once, without a "/" at its end.
    `UserError` for what can be no path: empty, a variable that is not set, no home folder of that
    name, control characters, too long."""
    shown = repr(text if len(text) < 200 else f"{text[:200]}...")
    if not text.strip():
        raise UserError(f"{shown}: expected a path, and an empty one is none")
    if not is_one_line(text):
        raise UserError(f"{shown}: a path has no control characters, and is UTF-8")
    found = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$(\w+|\{[^}]*\})", found):
        raise UserError(f"{shown}: the variable {unset[0]} is not set here: set it")
    if found.startswith("~"):
        raise UserError(f"{shown}: no home folder of that name; write ./{text} for a file of ours")
    if len(found.encode()) > LONGEST_PATH or max(map(len, found.encode().split(b"/"))) > 255:
        raise UserError(f"{shown}: the name is too long, a part may have 255 bytes; shorten it")
    return found.rstrip("/") or "/"


def is_one_line(text: str) -> bool:
    """Whether a text has no control characters, and no bytes that are not UTF-8."""
    return not any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text)
