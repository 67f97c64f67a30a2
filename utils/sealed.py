"""A checkpoint folder that vouches for itself: written whole or not at all, sealed by state.json.

It is a folder of diffusers, too: model_index.json names its components and what their pipeline
needs to know beside them.

state.json is written last. It names the step and the sha256 of every file, and holds its own hash.
Where a user names something else than such a folder, `name_instead` says what to do.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from loss.interpolant import PATHS
from models.checks.errors import UserError
from models.checks.file_kinds import WEIGHT_ENDINGS, WEIGHT_FILES, read_json, what_is
from models.checks.values import RecordError
from models.weights.configs import CONFIG, read_config
from utils.files import files_below, sha256_file, sync, sync_tree
from utils.provenance import versions
from utils.records import number, parse_record

STATE = "state.json"
FORMAT = 2  # of state.json; 1 had no hash of itself
UNFINISHED = (".tmp-", ".trash-")
MODEL_INDEX = "model_index.json"
EXAMPLE = "a run, or a checkpoint of one like exps/NAME/checkpoints/0400000"


def seal_checkpoint(
    final: Path, step: int, write: Callable[[Path], dict[str, str] | None], state: dict
) -> Path:
    """Call `write(folder)` to fill a new checkpoint beside `final`, seal it with `state` and a hash
    of every file, and give it its name. `write` may return hashes that it knows already."""
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise FileExistsError(errno.EEXIST, f"its name is taken by {what_is(final)}", str(final))
    draft = final.with_name(UNFINISHED[0] + final.name)
    discard(draft)
    try:
        draft.mkdir(parents=True)
        known = write(draft) or {}
        names = [str(path.relative_to(draft)) for path in files_below(draft)]
        files = {name: known.get(name) or sha256_file(draft / name) for name in names}
        sealed = {"format": FORMAT, "step": step} | state
        sealed |= {"versions": versions(), "files": files}
        sealed["sha256"] = _hash_of_state(sealed)
        (draft / STATE).write_text(json.dumps(sealed, indent=1) + "\n")
        sync_tree(draft)
        if final.exists():
            remove_checkpoint(final)  # not whole, or the run would have continued from it
        draft.rename(final)
    except BaseException:
        discard(draft)
        raise
    sync(final.parent)
    _found_whole[final] = _signature(final)
    return final


def remove_checkpoint(folder: Path) -> None:
    """Rename first, so that a kill cannot leave half a checkpoint under a valid name."""
    trash = folder.with_name(UNFINISHED[1] + folder.name)
    discard(trash)
    shutil.rmtree(folder.rename(trash))


def discard(path: Path) -> None:
    """Delete what has a name of ours for something unfinished, as far as that is possible."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@dataclass
class CheckpointState:
    """state.json of a checkpoint."""

    # optimizer steps done
    step: int | None = number(None, at_least=0)
    # sha256 of every file, by its path in the folder
    files: dict[str, str] = field(default_factory=dict)
    # of this file; from 2 on it has a hash of its own content, without that hash
    format: int = number(1, at_least=1, at_most=FORMAT)
    sha256: str | None = None
    # what it was written with (utils/provenance.py)
    versions: dict[str, str | None] = field(default_factory=dict)
    # passes through the data
    epoch: float | None = number(None, at_least=0)
    seed: int | None = number(None, at_least=0)
    # number of processes
    ranks: int | None = number(None, at_least=1)
    # interpolant between data and noise
    path: str | None = None
    # names of the classes in the order of their labels
    classes: list[str] | None = None
    # hashes of images and labels (utils.data.base.content_of)
    content: dict[str, str] | None = None
    # settings that define the run, as utils.config.load.recorded_config reads them
    config: dict[str, Any] | None = None
    # whether it was made of published weights, and of which
    imported: bool = False
    source: dict[str, Any] | None = None


def read_state_json(
    folder: Path, remedy: str = "copy the checkpoint again, or choose another"
) -> CheckpointState:
    """The state.json of a checkpoint; a `UserError` that ends in `remedy` if it is absent, is not
    as it was written, or names files outside of `folder`."""
    path = folder / STATE
    content = read_json(path, remedy)
    try:
        state = parse_record(content, CheckpointState)
    except RecordError as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    if (state.format > 1 or state.sha256) and state.sha256 != _hash_of_state(content):
        raise UserError(f"{path} is damaged: it is not as it was written; {remedy}")
    if state.path not in (None, *PATHS):
        raise UserError(
            f"{path}: path={state.path!r}: expected one of {', '.join(PATHS)}; {remedy}"
        )
    for name in state.files:
        if not name or "\0" in name or name[0] == "/" or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path} names {name!r}, which is not in its folder; {remedy}")
    return state


def _hash_of_state(state: dict) -> str:
    """sha256 of the content of a state.json, without its own hash."""
    rest = {name: value for name, value in state.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass
class ModelIndex:
    """What is read of a model_index.json, beside the classes of its components; None: not said."""

    # interpolant that the SiT was trained on
    path: str | None = None
    # readable names of the classes, by their label in text
    id2label: dict[str, str] | None = None
    # of utils/samplers.py
    solver: str | None = None


def write_model_index(folder: Path, vae: object, index: ModelIndex) -> None:
    """Make a pipeline of a folder with `vae`, a diffusers autoencoder, in vae/ and a SiT in
    sit_ema/."""
    content = {"_class_name": "RepaePipeline", "_diffusers_version": version("diffusers")}
    content |= {"vae": ["diffusers", type(vae).__name__], "sit_ema": ["models.sit", "SiT"]}
    content |= {name: value for name, value in asdict(index).items() if value is not None}
    (folder / MODEL_INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_model_index(folder: Path) -> ModelIndex:
    """Of a folder without one, nothing is known. `UserError` for one that is none of ours."""
    path, remedy = folder / MODEL_INDEX, "copy its folder again"
    if not os.path.lexists(path):
        return ModelIndex()
    try:
        index = parse_record(read_json(path, remedy), ModelIndex)
    except RecordError as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    if index.path not in (None, *PATHS):
        known = ", ".join(PATHS)
        raise UserError(f"{path}: path={index.path!r}: expected one of {known}; {remedy}")
    if not all(label.isascii() and label.isdigit() for label in index.id2label or {}):
        raise UserError(f'{path}: id2label: expected names by their label, like {{"0": ...}}')
    return index


# checkpoints that this process has read or written as whole, as they were then: read but once
_found_whole: dict[Path, list] = {}


def _signature(folder: Path) -> list:
    """Name, size and times of every file, which change with its content."""
    stats = [(path, path.stat()) for path in files_below(folder)]
    return [(path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]


def find_fault(folder: Path, read_all: bool = True) -> str | None:
    """What keeps `folder` from being a whole checkpoint; None if it is one. Reads every byte, or
    without `read_all` looks only whether the files are there."""
    if (kind := what_is(folder)) != "a folder":
        return "it is absent" if kind == "absent" else f"it is {kind}, not a folder"
    try:
        state = read_state_json(folder)
    except UserError as error:
        return f"no valid {STATE} ({error})"
    if state.step is None:
        return f"no valid {STATE} (it has no step)"
    try:
        signature = _signature(folder)
        if _found_whole.get(folder) == signature:
            return None
        for name, digest in state.files.items():
            if not os.path.isfile(folder / name):
                kind = what_is(folder / name)
                return f"{name} is missing" if kind == "absent" else f"{name} is {kind}"
            if read_all and sha256_file(folder / name) != digest:
                return f"{name} is damaged"
        names = {str(path.relative_to(folder)) for path in files_below(folder)}
    except OSError as error:
        return f"it cannot be read ({error.strerror}: {error.filename})"
    if state.format == 1 and (unknown := names - {*state.files, STATE}):
        # nothing else vouches for an old state.json
        return f"no valid {STATE} (it does not list {min(unknown)})"
    if read_all:
        _found_whole[folder] = signature
    return None


# --------------------------------------------------------------------------------------
# What else a user may have named.


def advise_import(file: Path) -> str:
    """What to do with a published file that is named where a checkpoint folder is needed."""
    return f"run scripts/import_official.py {file} OUT_DIR, and name OUT_DIR"


def name_instead(given: Path, part: str) -> str:
    """What to do where `given` is no checkpoint folder, as it has no `part`/: the end of a message,
    in words."""
    around = (folder for folder in given.parents[:2] if (folder / part / CONFIG).is_file())
    if found := next(around, None):
        return f"name the checkpoint around it, {found}"
    generators = (given / "transformer", given / "unet")  # of a pipeline of diffusers
    if what_is(given) in WEIGHT_FILES or any(map(_has_weights, generators)):
        return advise_import(given)
    if any(_is_vae(folder) for folder in (given, given / "vae")):
        return f"it is a VAE alone; name {EXAMPLE}"
    return advise_import(given) if _has_weights(given) else f"name {EXAMPLE}"


def _is_vae(folder: Path) -> bool:
    """Whether a folder of diffusers holds an autoencoder, by its config."""
    try:
        return str(read_config(folder / CONFIG).get("_class_name")).startswith("Autoencoder")
    except UserError:
        return False


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in WEIGHT_ENDINGS for file in folder.glob("*.*"))
