"""Where a checkpoint is that a user has named: a folder, a run, or a repository of the hub.

Of a repository, weights and configs are downloaded, never code.
"""

import re
from datetime import datetime
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from models.autoencoders.names import published_vae
from models.checks.errors import UserError, short
from models.checks.file_kinds import what_is
from models.weights.configs import CONFIG, WEIGHTS
from utils.checkpoint import (
    DISCRIMINATOR,
    SIT_EMA,
    VAE_FOLDER,
    Checkpoints,
    newest_of,
)
from utils.config.load import CONFIG_FILE
from utils.files import expand_path, files_below, format_bytes
from utils.sealed import EXAMPLE, MODEL_INDEX, STATE, name_instead

WAIT = "it is a run that has saved no checkpoint yet: wait for one, or name another run"
LISTED = "Their files are there. What is in them is checked when one of them is taken."
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([^@\s]+))?", re.ASCII)


def locate_checkpoint(given: str | Path) -> Path:
    """The folder with sit_ema/ and vae/ that `given` means: itself; for a run's folder its newest
    whole checkpoint; for OWNER/NAME[@REVISION], a repository of the hub, its copy on this machine.
    A line says what was chosen. Raises `UserError` for whatever is none of these."""
    folder = _locate(given, (VAE_FOLDER, SIT_EMA))
    require_checkpoint(folder)
    return folder


def locate_vae(given: str | Path) -> Path:
    """The same for a VAE: the folder may also be a mere diffusers folder."""
    return _locate(given, ("", VAE_FOLDER))


def locate_vae_spec(spec: str) -> str:
    """`locate_vae` for what `models.vae.load_vae` takes: a run's folder, and OWNER/NAME@REVISION,
    as the folder that is meant; anything else as it is."""
    known = published_vae(spec) or (what_is(spec) != "a folder" and "@" not in spec)
    return spec if known else str(locate_vae(spec))


def list_checkpoints(run: Path) -> str:
    """The checkpoints of a run as a table: step, whether it has EMA weights, size, date. Their
    files are there, but not read, which would take minutes."""
    run = run.parent if run.name == "checkpoints" else run
    if not (run / "checkpoints").is_dir():
        if (run / CONFIG_FILE).is_file():
            return f"{run}: {WAIT}"
        kind = what_is(run)
        found = "no such folder" if kind == "absent" else f"{kind} without checkpoints/"
        raise UserError(f"--list: {run} is no run ({found}): name one like exps/NAME")
    lines = [f"{'step':>9}  EMA  {'size':>8}  {'date':<16}  checkpoint"]
    for folder in Checkpoints(run).whole(read_all=False):
        size = format_bytes(sum(path.stat().st_size for path in files_below(folder)))
        date = f"{datetime.fromtimestamp((folder / STATE).stat().st_mtime):%Y-%m-%d %H:%M}"
        ema = "yes" if (folder / SIT_EMA / CONFIG).is_file() else "no"
        lines.append(f"{int(folder.name):>9,}  {ema:<3}  {size:>8}  {date}  {folder}")
    return "\n".join([*lines, LISTED]) if len(lines) > 1 else f"{run} holds no whole checkpoint"


def require_checkpoint(folder: Path) -> None:
    """`UserError` unless `folder` can be a checkpoint that is sampled from."""
    if (found := what_is(folder)) != "a folder":
        found = "no such folder" if found == "absent" else f"it is {found}"
        raise UserError(f"checkpoint {folder}: {found}; {name_instead(folder, SIT_EMA)}")
    missing = [n for n in (SIT_EMA, VAE_FOLDER) if not (folder / n / CONFIG).is_file()]
    if not missing:
        return
    config = folder / missing[0] / CONFIG
    if (found := what_is(config)) != "absent":
        raise UserError(f"{config} is {found}, expected a JSON file: copy the checkpoint again")
    raise UserError(f"{folder} is no checkpoint, as it has no {config.relative_to(folder)}: "
                    f"{_what_else(folder)}")  # fmt: skip


def _what_else(folder: Path) -> str:
    """What a folder that is no checkpoint is instead, and what to name."""
    if (folder / CONFIG_FILE).is_file():
        return WAIT
    if runs := sorted(path.parent.name for path in folder.glob("*/checkpoints")):
        return f"name one of the runs in it: {', '.join(runs[:4])}{', ...' * (len(runs) > 4)}"
    return name_instead(folder, SIT_EMA)


def _locate(given: str | Path, parts: tuple[str, ...]) -> Path:
    """parts: the subfolders whose weights are needed, as far as they are there."""
    folder = Path(expand_path(str(given)))
    match = HUB_ID.fullmatch(str(folder)) if what_is(folder) == "absent" else None
    # a wrong name in exps/ is no repository of somebody called exps
    if match and not Path(match[1]).parent.exists():
        return _download(match[1], match[2], parts)
    found = newest_of(folder)
    if found != folder:
        print(f"{folder}: taking its newest whole checkpoint, {found}")
    return found


def _download(repo: str, revision: str | None, parts: tuple[str, ...]) -> Path:
    """The copy of a repository on this machine: its configs, and the weights of `parts`."""
    name = f"{repo}@{revision}" if revision else repo
    configs = [MODEL_INDEX, STATE, "README.md", *(_join(part, CONFIG) for part in parts)]
    weights = [DISCRIMINATOR, *(_join(part, WEIGHTS) for part in parts)]
    folder = _snapshot(repo, revision, configs)
    there = [part for part in parts if (folder / part / CONFIG).is_file()]
    if not there or (SIT_EMA in parts and len(there) < len(parts)):
        expected = " and ".join(f"{part}/" if part else CONFIG for part in parts)
        raise UserError(f"{name} of the hub has no {expected}: name the repository of an exported "
                        f"pipeline, {EXAMPLE}")  # fmt: skip
    _snapshot(repo, revision, weights)
    for part in there:
        if not (folder / part / WEIGHTS).is_file():
            raise UserError(f"{name} of the hub: {_join(part, WEIGHTS)} is not in it, or was not "
                            f"downloaded: {_by_hand(repo, revision)}")  # fmt: skip
    print(f"{name} of the hub: {folder}")
    return folder


def _join(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name


def _snapshot(repo: str, revision: str | None, files: list[str]) -> Path:
    """Those of the files that the repository has; `UserError` with a remedy if it cannot be had."""
    name = f"{repo}@{revision}" if revision else repo
    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=files)
        )
    except errors.GatedRepoError:
        why = f"its owner lets nobody in unasked: ask for access on https://huggingface.co/{repo}"
        raise UserError(f"{name} of the hub: {why}, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        why = "no such folder here, and no such repository on the hub, or a private one"
        raise UserError(f"{name}: {why}: correct the name, or run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        why = f"the repository has no branch, tag or commit {revision}"
        raise UserError(f"{name} of the hub: {why}: correct what follows the @") from None
    except errors.HFValidationError as error:
        raise UserError(f"{name}: no such folder here, nor a name of the hub ({error})") from None
    except (errors.LocalEntryNotFoundError, OSError) as error:
        why = short(error, 100)
        if isinstance(error, errors.LocalEntryNotFoundError):
            offline = constants.HF_HUB_OFFLINE
            why = "HF_HUB_OFFLINE is set" if offline else "it cannot be reached from here"
        why = f"no such folder here, and not to be had from the hub ({why})"
        raise UserError(f"{name}: {why}: {_by_hand(repo, revision)}") from None


def _by_hand(repo: str, revision: str | None) -> str:
    more = f" --revision {revision}" if revision else ""
    command = f"hf download {repo}{more} --local-dir DIR"
    return f"correct the name, or run `{command}` where there is a network and name DIR"
