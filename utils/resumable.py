"""A folder that one long command fills, and that the same command goes on with after a kill."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import UserError
from utils.checkpoint import write_atomically

PLAN = "plan.json"  # what the folder was begun with
META = "meta.json"  # written last: a folder with it is whole
TEXT = ("utf-8", "surrogateescape")


def check_plan(out: Path, plan: dict) -> None:
    """`UserError` if OUT holds something else, or was begun with another value of `plan`."""
    path = out / PLAN
    if not path.exists():
        foreign = [p.name for p in out.iterdir() if p.suffix != ".tmp"] if out.exists() else []
        if [name for name in foreign if name != ".lock"]:
            raise UserError(f"OUT {out} holds other files ({foreign[0]}); choose an empty folder")
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    for name, value in plan.items():
        if begun.get(name) != value:
            text = f"{out} was begun with {name}={begun.get(name)}, now it is {value}"
            raise UserError(f"{text}; use the same input and settings, or another OUT")


def check_disk(out: Path, need: int) -> None:
    """Say how many bytes are to come, and how many there is room for; `UserError` if too few."""
    existing, free = free_disk(out)
    sizes = f"{format_size(need)} still to write, {format_size(free)} free at {existing}"
    print(sizes, flush=True)
    if need > free:
        raise UserError(f"not enough disk: {sizes}; free some or choose another OUT")


def free_disk(path: Path) -> tuple[Path, int]:
    """The nearest existing folder to `path`, and the free bytes there."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    return place, shutil.disk_usage(place).free


def format_size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One command per OUT. The lock is the process's own: workers left by a kill do not hold it."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"another run writes {out}; wait for it, or stop it") from None
        yield


def write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def list_keys(source) -> list[str]:
    """The keys of all images of a `utils.data.Source`, for a file of one a line."""
    keys = [source.key(i) for i in range(len(source))]
    for key in keys:
        if "\n" in key:
            raise UserError(f"{key!r} has a line break in its name; rename it")
    return keys


def write_lines(path: Path, lines: list[str]) -> None:
    """One string a line; file names may hold bytes that are no UTF-8."""
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode(*TEXT))


def read_lines(path: Path) -> list[str]:
    return path.read_bytes().decode(*TEXT).split("\n")[:-1]
