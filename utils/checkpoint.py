"""A checkpoint is a directory, and the release format (layout: README, "What a run leaves").

Written under a temporary name, synced to disk, renamed: a directory with a valid `state.json` is
whole, whatever killed the process; anything else is ignored and reported.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from models.errors import UserError

STATE = "state.json"
_UNFINISHED = (".tmp-", ".trash-")


class Checkpoints:
    """The checkpoints of one run, `RUN_DIR/checkpoints/0400000`; only one process may write."""

    def __init__(self, run_dir: Path, keep_last: int = 3, milestone_every: int = 0):
        self.folder = run_dir / "checkpoints"
        self.keep_last, self.milestone_every = keep_last, milestone_every

    def save(self, step: int, write: Callable[[Path], None], state: dict) -> Path:
        """Call `write(folder)` to fill a new checkpoint, then seal it with `state` and hashes."""
        final = self.folder / f"{step:07d}"
        draft = self.folder / f"{_UNFINISHED[0]}{final.name}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        files = {str(p.relative_to(draft)): sha256_file(p) for p in _files(draft)}
        sealed = {"step": step} | state | {"versions": versions(), "files": files}
        (draft / STATE).write_text(json.dumps(sealed, indent=1) + "\n")
        _sync_tree(draft)
        if final.exists():  # not whole, or the run would have gone on from it
            self._remove(final)
        draft.rename(final)
        sync(self.folder)
        self._retire()
        return final

    def latest(self, report: Callable[[str], None] = print, read_all: bool = True) -> Path | None:
        """The newest whole checkpoint; `report` is told of every one passed over. Without
        `read_all`, files must be there, but their bytes are not looked at."""
        for folder in sorted(self._all(), reverse=True):
            fault = find_fault(folder, read_all)
            if fault is None:
                return folder
            report(f"ignored {folder}: {fault}")
        return None

    def whole(self, report: Callable[[str], None] = print) -> list[Path]:
        """All whole checkpoints by step; `report` is told of every one passed over."""
        faults = {folder: find_fault(folder) for folder in sorted(self._all())}
        for folder, fault in faults.items():
            if fault is not None:
                report(f"ignored {folder}: {fault}")
        return [folder for folder, fault in faults.items() if fault is None]

    def sweep(self) -> None:
        """Delete what killed processes left half-written or half-deleted."""
        for folder in self.folder.glob(".*"):
            if folder.name.startswith(_UNFINISHED):
                shutil.rmtree(folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return [p for p in self.folder.glob("[0-9]*") if p.is_dir() and p.name.isdigit()]

    def _retire(self) -> None:
        for folder in sorted(self._all())[: -self.keep_last]:
            if not self.milestone_every or int(folder.name) % self.milestone_every:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Rename first, so that a kill cannot leave half a checkpoint under a valid name."""
        trash = folder.with_name(_UNFINISHED[1] + folder.name)
        shutil.rmtree(trash, ignore_errors=True)
        shutil.rmtree(folder.rename(trash))


def find_start(
    resume: str, checkpoints: Checkpoints, accelerator: Accelerator
) -> tuple[Path | None, dict]:
    """What `run.resume` means, the same on every rank: the checkpoint to go on from and its state,
    or (None, {}) for a new run."""
    answer = [None, {}, None]
    if accelerator.is_main_process:
        checkpoints.sweep()
        checkpoint, fault = choose_start(resume, checkpoints, accelerator.print)
        state = json.loads((checkpoint / STATE).read_text()) if checkpoint and not fault else {}
        answer = [checkpoint, state, fault]
    checkpoint, state, fault = broadcast_object_list(answer)
    if fault:
        raise UserError(fault)
    accelerator.print(f"going on from {checkpoint}" if checkpoint else "starting a new run")
    return checkpoint, state


def choose_start(
    resume: str, checkpoints: Checkpoints, report: Callable[[str], None], read_all: bool = True
) -> tuple[Path | None, str | None]:
    """(checkpoint or None, what is wrong or None)"""
    run = checkpoints.folder.parent
    if resume == "auto":
        return checkpoints.latest(report, read_all), None
    if resume == "never":
        fault = f"{run} holds checkpoints and run.resume=never: choose another run.name"
        return None, fault if checkpoints.latest(report, read_all) else None
    chosen = Path(resume)
    fault = find_fault(chosen, read_all)
    if fault:
        return chosen, f"run.resume={resume} is not a whole checkpoint: {fault}"
    newest = checkpoints.latest(report, read_all)
    if newest and newest.resolve() != chosen.resolve():  # it would be what `auto` goes on from
        return chosen, f"{run} holds {newest.name} too: choose another run.name, or delete that"
    return chosen, None


def find_fault(folder: Path, read_all: bool = True) -> str | None:
    """What keeps `folder` from being a whole checkpoint; None if it is one. Reads every byte, or
    without `read_all` looks only whether the files are there."""
    try:
        files = json.loads((folder / STATE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"no valid {STATE}"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if read_all and sha256_file(path) != digest:
            return f"{name} is damaged"
    return None


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str | None]:
    """What this was computed with, for whoever repeats it."""
    names = ("torch", "diffusers", "accelerate", "timm", "numpy")
    return {"python": platform.python_version(), "commit": git_commit()} | {
        name: version(name) for name in names
    }


def git_commit() -> str | None:
    """Commit of this source tree ("-dirty" if files differ from it); None outside git."""
    here = Path(__file__).resolve().parent
    command = [
        "git",
        "-C",
        str(here),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return answer.stdout.strip() or None


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Replace a file by text, bytes, or what `content(file)` writes; a kill leaves the old one or
    the new one, and so does a power cut."""
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
    sync(draft)
    draft.rename(path)
    sync(path.parent)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Make a file or folder durable: its bytes reach the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
