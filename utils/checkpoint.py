"""Checkpoints: what one holds, how it is written and read, and which ones of a run are kept.

    RUN_DIR/checkpoints/0400000/
        vae/                       diffusers folder; the latent norm's statistics in its config
        sit/                       raw SiT
        sit_ema/                   moving average of the SiT: what is sampled
        discriminator.safetensors
        optim.pt                   optimizers, loss scales, LeCam averages: no pickled classes
        model_index.json           the components and the pipeline's settings, as diffusers has them
        state.json                 step, versions, sha256 of every file and of itself: written last

A checkpoint is written under a temporary name, synced to disk and renamed: a directory with a valid
`state.json` is whole, whatever killed the process; anything else is ignored and reported. Folders
with other names, files and links in `checkpoints/` are not ours: neither counted nor touched.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch
import yaml

from models.checks.errors import UserError, short
from models.weights.configs import WEIGHTS
from models.weights.headers import write_safetensors
from models.weights.loading import load_strictly
from models.weights.reading import read_state
from utils.distributed import Ranks
from utils.files import HashedFile, format_bytes, free_disk, reason, sweep_drafts
from utils.process.ending import say
from utils.sealed import (
    STATE,
    UNFINISHED,
    ModelIndex,
    advise_import,
    discard,
    find_fault,
    read_state_json,
    remove_checkpoint,
    seal_checkpoint,
    write_model_index,
)

if TYPE_CHECKING:  # diffusers takes seconds to import, and most readers here need no network
    from models.discriminator import PatchGAN
    from models.sit import SiT
    from models.vae import VAE

VAE_FOLDER, SIT, SIT_EMA = "vae", "sit", "sit_ema"
DISCRIMINATOR, OPTIMIZERS = "discriminator.safetensors", "optim.pt"
# begin of the names under which the configs of starts that left no checkpoint are kept
UNUSED_CONFIG = "config.unused"
AVERAGES = "averages"  # part of OPTIMIZERS: what the next log line is the mean of

# --------------------------------------------------------------------------------------
# What a checkpoint holds.


@dataclass
class Contents:
    """The networks and the training state of one checkpoint; None leaves a part out. Something new
    goes into `optimizers` in `contents_of` and back in `restore_training_state`, or into a field
    and file of its own in `write`.

    latent_stats: per-channel mean and std, (C,), that go into the VAE's config; None = unknown.
    optimizers: nested dictionaries of tensors and plain values, nothing that needs a pickle.
    index: what model_index.json says of the EMA SiT; None = there is no such file.
    """

    vae: VAE
    latent_stats: tuple[torch.Tensor, torch.Tensor] | None = None
    sit: SiT | None = None
    ema: SiT | None = None
    disc: PatchGAN | None = None
    optimizers: dict | None = None
    index: ModelIndex | None = None

    def write(self, folder: Path) -> dict[str, str]:
        """Write every part into an existing folder; returns the sha256 of the large files."""
        hashes = {}
        self.vae.save_config(folder / VAE_FOLDER, *(self.latent_stats or ()))
        weights = {f"{VAE_FOLDER}/{WEIGHTS}": self.vae.net}
        for name, sit in ((SIT, self.sit), (SIT_EMA, self.ema)):
            if sit is not None:
                sit.save_config(folder / name)
                weights[f"{name}/{WEIGHTS}"] = sit
        if self.disc is not None:
            weights[DISCRIMINATOR] = self.disc
        for name, net in weights.items():
            with HashedFile(folder / name) as file:
                write_safetensors(file.write, net.state_dict(), {"format": "pt"})
            hashes[name] = file.sha256
        if self.optimizers is not None:
            with HashedFile(folder / OPTIMIZERS) as file:
                torch.save(self.optimizers, cast(IO[bytes], file))
            hashes[OPTIMIZERS] = file.sha256
        if self.ema is not None and self.index is not None:
            write_model_index(folder, self.vae.net, self.index)
        return hashes

    def num_bytes(self) -> int:
        """Size of what `write` writes, but for some KiB."""
        nets = (self.vae, self.sit, self.ema, self.disc)
        states = [net.state_dict() for net in nets if net is not None]
        return sum(t.numel() * t.element_size() for t in _tensors([*states, self.optimizers]))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)


def load_sit_weights(sit: SiT, folder: Path, name: str) -> None:
    """Give `sit`, which may be on the meta device, the weights of `SIT` or `SIT_EMA`; strict."""
    path = folder / name / WEIGHTS
    load_strictly(sit, read_state(path), path, "the SiT of this config")


def load_discriminator_weights(disc: PatchGAN, folder: Path) -> bool:
    """Give `disc` the weights of a checkpoint; False if that holds no discriminator."""
    path = folder / DISCRIMINATOR
    if not path.is_file():
        return False
    load_strictly(disc, read_state(path), path, "the discriminator of this config")
    return True


def contents_of(nets, averages: dict | None = None, index: ModelIndex | None = None) -> Contents:
    """What a checkpoint of a run's networks (utils.training.networks.Networks) holds; `averages`:
    the state of the Tracker."""
    optimizers = {name: trained.state_dict() for name, trained in nets.trained.items()}
    if nets.lecam:
        optimizers["lecam"] = nets.lecam.state_dict()
    if averages:
        optimizers[AVERAGES] = averages
    stats = nets.ema.bn.stats()
    return Contents(nets.vae, stats, nets.sit, nets.ema, nets.disc, optimizers, index)


def restore_training_state(nets, folder: Path) -> None:
    """Give built networks whatever else a checkpoint holds of the training: moments of the
    optimizers, loss scales, LeCam averages. The inverse of `contents_of`."""
    state = _read_optimizers(folder)
    missing = set(nets.trained) - set(state)
    if missing:
        raise UserError(
            f"{folder} has no optimizer state of {', '.join(sorted(missing))}: start a new run"
        )
    for name, trained in nets.trained.items():
        trained.load_state_dict(state[name])
    if nets.lecam and "lecam" in state:
        nets.lecam.load_state_dict(state["lecam"])


def read_averages(folder: Path) -> dict:
    """The state of the Tracker in a checkpoint; {} if it was saved just after a log line."""
    return _read_optimizers(folder).get(AVERAGES, {})


def _read_optimizers(folder: Path) -> dict:
    path = folder / OPTIMIZERS
    if not path.is_file():
        raise UserError(f"{folder} holds no optimizers (imported?): use run.init_from={folder}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile file makes the unpickler raise anything
        raise UserError(
            f"{path} cannot be read ({short(error)}): choose another checkpoint"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state of optimizers: choose another checkpoint")
    return state


# --------------------------------------------------------------------------------------
# The checkpoints of one run.


class Checkpoints:
    """The checkpoints of one run, `RUN_DIR/checkpoints/0400000`; only one process may write.

    The newest `keep_last` whole ones are kept, and for ever those at multiples of
    `milestone_every` steps (0: none).
    """

    def __init__(self, run_dir: Path, keep_last: int = 3, milestone_every: int = 0):
        self.folder = run_dir / "checkpoints"
        self.keep_last, self.milestone_every = keep_last, milestone_every

    def save(
        self,
        step: int,
        write: Callable[[Path], dict[str, str] | None],
        state: dict,
        num_bytes: int = 0,
        prune: bool = True,
    ) -> Path:
        """`seal_checkpoint` under the step's name; then `prune`. OSError if that is not possible;
        all earlier checkpoints are then as they were. `num_bytes`: room that it takes. What cannot
        be deleted is said, and is tried again after the next save."""
        final = self.path(step)
        place, free = free_disk(self.folder)
        if num_bytes > free:
            sizes = f"{format_bytes(num_bytes)} are needed, {format_bytes(free)} free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}", str(place))
        seal_checkpoint(final, step, write, state)
        try:
            if prune:
                self.prune()
        except OSError as error:
            say(f"warning: {final} is saved, but an older one is not deleted ({reason(error)})")
        return final

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.folder / name_of_step(step)

    def prune(self) -> None:
        """Delete the whole checkpoints that are no longer kept."""
        kept = 0
        for folder in reversed(self._own()):
            step = int(folder.name)
            milestone = self.milestone_every and step % self.milestone_every == 0
            if kept < self.keep_last:
                kept += self._fault(folder) is None
            elif not milestone and self._fault(folder) is None:
                remove_checkpoint(folder)

    def latest(self, report: Callable[[str], None] = print, read_all: bool = True) -> Path | None:
        """The newest whole checkpoint; `report` is called with a line for each one passed over.
        Without `read_all`, files must be there, but their bytes are not looked at."""
        for folder in reversed(self._own()):
            fault = self._fault(folder, read_all)
            if fault is None:
                return folder
            report(f"ignored {folder}: {fault}")
        return None

    def whole(self, report: Callable[[str], None] = print, read_all: bool = True) -> list[Path]:
        """All whole checkpoints by step; `report` and `read_all` as in `latest`."""
        faults = {folder: self._fault(folder, read_all) for folder in self._own()}
        for folder, fault in faults.items():
            if fault is not None:
                report(f"ignored {folder}: {fault}")
        return [folder for folder, fault in faults.items() if fault is None]

    def sweep(self) -> None:
        """Delete what killed processes left half-written or half-deleted in the run's folder."""
        for folder in self._entries():
            for prefix in UNFINISHED:
                if folder.name.startswith(prefix) and is_step(folder.name.removeprefix(prefix)):
                    discard(folder)
        for folder in (self.folder.parent, self.folder.parent / "samples"):
            sweep_drafts(folder)

    def choose_start(
        self, resume: str, report: Callable[[str], None] = print, read_all: bool = True
    ) -> Path | None:
        """The checkpoint that `run.resume` (auto, never, or a folder: `newest_of`) means; None = a
        new run.

        A run that began with the folder `run.resume` goes on from its own newest one. Raises
        `UserError` where the run's own checkpoints contradict `run.resume`, or none is whole.
        """
        run, faults = self.folder.parent, []
        own = [path for path in self._entries() if is_step(path.name) and path.is_dir()]
        if resume == "never" and own:
            raise UserError(
                f"{run} holds checkpoints and run.resume=never: choose another run.name"
            )

        def note(line: str) -> None:
            faults.append(line.removeprefix("ignored "))
            report(line)

        newest = self.latest(note, read_all)
        if own and not newest:
            what = faults[0] if faults else f"{own[0]} is a link"
            raise UserError(
                f"{run} holds checkpoints, but none is whole ({what}): copy a whole one there, "
                f"choose another run.name, or delete {self.folder} to begin anew"
            )
        if resume in ("auto", "never") or (newest and self._began_with(resume)):
            return newest
        chosen = newest_of(Path(resume), report, read_all)
        if fault := find_fault(chosen, read_all):
            raise UserError(f"run.resume={resume} is not a whole checkpoint: {fault}")
        if newest and newest.resolve() != chosen.resolve():  # `auto` would continue from that one
            raise UserError(
                f"{run} holds {newest.name} too: choose another run.name, or delete that"
            )
        return chosen

    def _began_with(self, start: str) -> bool:
        """Whether a config that this run has saved names the checkpoint `start` as run.resume."""
        for path in self.folder.parent.glob("config*.yaml"):
            if path.name.startswith(UNUSED_CONFIG) or not path.is_file():
                continue
            try:
                saved = yaml.safe_load(path.read_text(encoding="utf-8"))["run"]["resume"]
                if Path(saved).resolve() == Path(start).resolve():
                    return True
            except (OSError, ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError):
                pass
        return False

    def _fault(self, folder: Path, read_all: bool = True) -> str | None:
        """`find_fault` of one of ours, which also must be that of its step."""
        fault = find_fault(folder, read_all)
        if fault is None and (step := read_state_json(folder).step) != int(folder.name):
            return f"its {STATE} is that of step {step}"
        return fault

    def _own(self) -> list[Path]:
        """The folders that have the names and the kind of our checkpoints, by step."""
        own = [p for p in self._entries() if is_step(p.name) and p.is_dir() and not p.is_symlink()]
        return sorted(own, key=lambda path: int(path.name))

    def _entries(self) -> list[Path]:
        try:
            return list(self.folder.iterdir())
        except OSError as error:  # a file, a link to nothing, or no right to read
            if not os.path.lexists(self.folder):
                return []
            raise UserError(
                f"{self.folder} cannot be read ({error.strerror}): it must be the folder of the "
                "run's checkpoints; move it away, or choose another run.name"
            ) from None


def newest_of(given: Path, report: Callable[[str], None] = print, read_all: bool = True) -> Path:
    """The newest whole checkpoint where `given` is a run's folder, or its checkpoints/; else
    `given`. `report` and `read_all` as for `Checkpoints.latest`; `UserError` if none is whole."""
    run = given.parent if given.name == "checkpoints" else given
    if not (run / "checkpoints").is_dir():
        return given
    newest = Checkpoints(run).latest(report, read_all)
    if newest is None:
        if files := sorted((run / "checkpoints").glob("*.pt")):
            raise UserError(f"{run} is a run of another implementation: {advise_import(files[-1])}")
        raise UserError(f"{run} holds no whole checkpoint yet: wait for one, or name another run")
    return newest


def name_of_step(step: int) -> str:
    """Folder name of a checkpoint: 0400000; more digits from 10,000,000 on."""
    return f"{step:07d}"


def is_step(name: str) -> bool:
    """Whether a name is one that `name_of_step` gives."""
    return name.isascii() and name.isdigit() and name == name_of_step(int(name))


def find_start(resume: str, checkpoints: Checkpoints) -> tuple[Path | None, int]:
    """The checkpoint that `run.resume` means and its step, or (None, 0) for a new run; the same on
    every rank. The main process clears away what killed processes left half-written."""

    def find() -> tuple[Path | None, int]:
        # what is passed over has been said by the checks before
        checkpoint = checkpoints.choose_start(resume, report=lambda _: None)
        checkpoints.sweep()
        step = read_state_json(checkpoint).step if checkpoint else 0
        return checkpoint, step or 0

    ranks = Ranks()
    checkpoint, step = ranks.on_main(find) or (None, 0)
    ranks.print(f"going on from {checkpoint}" if checkpoint else "starting a new run")
    return checkpoint, step
