"""sha256 of what files hold. A file that stays the same is read once: its hashes are kept.

A hash counts as long as path, device, inode, size, and the times of the last write and of the last
change of the inode are equal, to the nanosecond. The last one cannot be set back by a program, so
pictures that replace others of equal size under equal names are noticed even if they get the old
times. A file that has changed within the last `SETTLED` seconds is hashed again the next time: a
further write might leave its times as they are. So is any file where times tell less: `UNTOLD`.

The hashes lie in content.sqlite in the folder of caches, which several processes share. Without it
(unwritable, damaged) every file is hashed anew.
"""

import hashlib
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cache, partial
from pathlib import Path
from threading import Event
from typing import NamedTuple

from tqdm import tqdm

from models.checks.errors import UserError
from utils.files import TEXT, format_bytes

# path of a file, and a function to call with the number of bytes after each part that was read
Compute = Callable[[str, Callable[[int], None]], bytes]

STORE = "content.sqlite"
# Seconds. Pages that a program writes to through a memory map change a file's times once until the
# system has written them out, which Linux does after 30 s; timestamps are coarse to 2 s at worst.
SETTLED = 60
# File systems without a time of change of their own, or on which writing to a map may leave it.
UNTOLD = ("tmpfs", "ramfs", "vfat", "msdos", "exfat", "9p", "cifs", "smb3", "fuse")
# Hashing and reading leave the interpreter lock; a network answers many at a time.
THREADS = min(16, 2 * (os.cpu_count() or 1))
GROUP_FILES, GROUP_BYTES = 64, 2**24  # at most, that a thread reads in a row, or one large file
KEEP_EVERY = 5  # s between two writes to the store
BLOCK = 2**20  # bytes read at a time
SAID = 2**30  # bytes to hash, from which on a line and a bar say so
WAIT = 10  # s until another process lets go of the store


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, in hexadecimal; `UserError` if it cannot be read."""
    return file_sha256s([path])[0]


def file_sha256s(paths: Iterable[str | Path], unreadable: str | None = None) -> list[str]:
    """`file_sha256` of each; `unreadable`, if it is given, stands for files that cannot be read."""
    instead = None if unreadable is None else b""
    found = digests(paths, "bytes", _sha256_of_bytes, instead)
    return [value.hex() or str(unreadable) for value in found]


def digests(
    paths: Iterable[str | Path], kind: str, compute: Compute, unreadable: bytes | None = None
) -> list[bytes]:
    """What `compute` makes of each file, which must depend on its bytes and on `kind` alone: kept
    values are found under both. `unreadable`, if it is given, stands for files that cannot be read;
    else that is a `UserError`."""
    names, now = [os.fspath(path) for path in paths], time.time_ns()
    with ThreadPoolExecutor(THREADS) as pool, closing(_Store()) as store:
        parts = [names[k : k + 256] for k in range(0, len(names), 256)]
        files = [f for part in pool.map(partial(_look_at, kind, now), parts) for f in part]
        values = store.find(files)

        def keep(hashed: list[int]) -> None:
            """Of those that nothing has written to while they were read."""
            again = _look_at(kind, now, [names[i] for i in hashed])
            same = (i for i, file in zip(hashed, again) if file == files[i] and file.state)
            store.keep([(files[i], values[i]) for i in same])

        groups = _groups(files, [i for i, value in enumerate(values) if value is None])
        hashed, due = [], time.monotonic() + KEEP_EVERY
        with _Progress(sum(files[i].size for group in groups for i in group)) as progress:
            run = partial(_digest_each, compute, progress.tell, unreadable)
            shares = pool.map(run, [[names[i] for i in group] for group in groups])
            for group, share in zip(groups, shares):
                for i, value in zip(group, share):
                    values[i] = value
                hashed += group
                if time.monotonic() > due:
                    keep(hashed)
                    hashed, due = [], time.monotonic() + KEEP_EVERY
        keep(hashed)
    return [value or b"" for value in values]


def _groups(files: Sequence["_File"], todo: Iterable[int]) -> list[list[int]]:
    """The numbers in `todo`, those of many small files or of one large one together, for a thread
    to read in a row."""
    groups: list[list[int]] = []
    room = 0
    for i in todo:
        if not groups or files[i].size > room:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(i)
        room -= files[i].size + GROUP_BYTES // GROUP_FILES
    return groups


class _File(NamedTuple):
    """A file as the store knows it."""

    place: bytes  # hash of its path and of what is kept of it
    # hash of what stat says; None if that tells nothing: not there, changed just now, or `UNTOLD`
    state: bytes | None
    size: int


def _look_at(kind: str, now: int, paths: Sequence[str]) -> list[_File]:
    """Without opening them. Links in the name of a folder are resolved; of one in the name of the
    file, the target's inode tells."""
    found = []
    for path in paths:
        folder, name = os.path.split(path)
        place, state, size = _short_hash(f"{kind}\0{_real_path(folder)}/{name}"), None, 0
        with suppress(OSError, ValueError):  # opening it will say why
            s = os.stat(path)
            size = s.st_size
            if s.st_ctime_ns < now - SETTLED * 10**9 and s.st_dev not in _untold_devices():
                times = f"{s.st_mtime_ns} {s.st_ctime_ns}"
                state = _short_hash(f"{s.st_dev} {s.st_ino} {size} {times}")
        found.append(_File(place, state, size))
    return found


@cache
def _real_path(folder: str) -> str:
    return os.path.realpath(folder)


def _short_hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(*TEXT)).digest()[:16]


@cache
def _untold_devices() -> frozenset[int]:
    """Devices of the file systems in `UNTOLD` that are mounted; of a type such as fuse.sshfs, the
    first part counts."""
    found = set()
    with suppress(OSError, ValueError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            words, _, rest = line.partition(" - ")
            major, minor = words.split()[2].split(":")
            if rest.partition(" ")[0].partition(".")[0] in UNTOLD:
                found.add(os.makedev(int(major), int(minor)))
    return frozenset(found)


def _digest_each(
    compute: Compute, tell: Callable[[int], None], unreadable: bytes | None, paths: Sequence[str]
) -> list[bytes]:
    found = []
    for path in paths:
        try:
            found.append(compute(path, tell))
        except OSError as error:
            if unreadable is None:
                why = error.strerror or error
                raise UserError(f"cannot read {path}: {why}; repair or remove it") from error
            found.append(unreadable)
    return found


def _sha256_of_bytes(path: str, tell: Callable[[int], None]) -> bytes:
    digest = hashlib.sha256()
    # a FIFO would never answer
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("not a regular file")
        while block := file.read(BLOCK):
            digest.update(block)
            tell(len(block))
    return digest.digest()


class _Progress:
    """A line and a bar on stderr where much is to be read. An error ends what the threads read."""

    def __init__(self, total: int) -> None:
        self.ended, said = Event(), total >= SAID
        if said:
            text = f"reading {format_bytes(total)} to tell these data from others by their content"
            print(f"{text}; later runs need not, as long as the files stay", file=sys.stderr)
        seconds = 0.5 if sys.stderr.isatty() else 30  # between two lines of a log
        self.bar = tqdm(
            total=total, unit="B", unit_scale=True, disable=not said, mininterval=seconds
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.bar.close()

    def tell(self, num_bytes: int) -> None:
        if self.ended.is_set():
            raise InterruptedError
        with self.bar.get_lock():
            self.bar.update(num_bytes)


# --------------------------------------------------------------------------------------
# The store.


def cache_folder() -> Path:
    """Where caches lie: $REPA_E_CACHE, or $XDG_CACHE_HOME/repa_e, or ~/.cache/repa_e."""
    if own := os.environ.get("REPA_E_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "repa_e"


class _Store:
    """Values by place and state of their files. Whatever fails is said once, and then it is empty
    and takes nothing."""

    def __init__(self) -> None:
        self.db = None
        try:
            import sqlite3  # some builds of Python lack it

            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(folder / STORE, timeout=WAIT)
            self.db.execute(
                "CREATE TABLE IF NOT EXISTS digests (place BLOB PRIMARY KEY, state BLOB NOT NULL, "
                "value BLOB NOT NULL) WITHOUT ROWID"
            )
        except Exception as error:
            self._give_up(error)

    def find(self, files: Sequence[_File]) -> list[bytes | None]:
        """The value of each; None where there is none of a file in its present state."""
        kept: dict[bytes, list[bytes]] = {}  # state and value
        try:
            for k in range(0, len(files) if self.db else 0, 500):
                assert self.db is not None
                places = [file.place for file in files[k : k + 500]]
                marks = ",".join("?" * len(places))
                query = f"SELECT place, state, value FROM digests WHERE place IN ({marks})"
                kept.update((place, rest) for place, *rest in self.db.execute(query, places))
        except Exception as error:
            self._give_up(error)
            kept = {}
        pairs = ((file.state, kept.get(file.place)) for file in files)
        return [row[1] if state and row and row[0] == state else None for state, row in pairs]

    def keep(self, values: Sequence[tuple[_File, bytes | None]]) -> None:
        rows = [(file.place, file.state, value) for file, value in values if value]
        if self.db is None or not rows:
            return
        try:
            with self.db:
                self.db.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """sqlite3 raises many kinds for a damaged or locked file."""
        if self.db is not None:
            self.close()
        self.db = None
        _say_once(f"note: hashes of files are not kept in {cache_folder() / STORE} ({error}); "
                  "delete it, or set REPA_E_CACHE to a folder that can be written")  # fmt: skip

    def close(self) -> None:
        if self.db is not None:
            self.db.close()


@cache
def _say_once(words: str) -> None:
    print(words, file=sys.stderr)
