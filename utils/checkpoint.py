"""Checkpoints: what one holds, how it is written and read, and which ones of a run are kept.

    RUN_DIR/checkpoints/0400000/
        vae/                       diffusers folder; the latent norm's statistics in its config
        sit/                       raw SiT
        sit_ema/                   moving average of the SiT: what is sampled
        discriminator.safetensors
        optim.pt                   optimizers, loss scales, LeCam averages: no pickled classes
        state.json                 step, versions, sha256 of every file: written last

A checkpoint is written under a temporary name, synced to disk and renamed: a directory with a valid
`state.json` is whole, whatever killed the process; anything else is ignored and reported.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from models.errors import UserError
from models.weights import WEIGHTS, load_strictly, read_state
from utils.distributed import Ranks
from utils.files import files_below, sha256_file, sync, sync_tree
from utils.provenance import versions

if TYPE_CHECKING:  # diffusers takes seconds to import, and most readers here need no network
    from models.discriminator import PatchGAN
    from models.sit import SiT
    from models.vae import VAE

STATE = "state.json"
VAE_FOLDER, SIT, SIT_EMA = "vae", "sit", "sit_ema"
DISCRIMINATOR, OPTIMIZERS = "discriminator.safetensors", "optim.pt"
UNFINISHED = (".tmp-", ".trash-")

# --------------------------------------------------------------------------------------
# What a checkpoint holds.


@dataclass
class Contents:
    """The networks and the training state of one checkpoint; None leaves a part out. Something new
    goes into `optimizers` in `contents_of` and back in `restore_training_state`, or into a field
    and file of its own in `write`.

    latent_stats: per-channel mean and std, (C,), that go into the VAE's config; None = unknown.
    optimizers: nested dictionaries of tensors and plain values, nothing that needs a pickle.
    """

    vae: VAE
    latent_stats: tuple[torch.Tensor, torch.Tensor] | None = None
    sit: SiT | None = None
    ema: SiT | None = None
    disc: PatchGAN | None = None
    optimizers: dict | None = None

    def write(self, folder: Path) -> None:
        """Write every part into an existing folder."""
        self.vae.save(folder / VAE_FOLDER, *(self.latent_stats or ()))
        for name, sit in ((SIT, self.sit), (SIT_EMA, self.ema)):
            if sit is not None:
                sit.save_pretrained(folder / name)
        if self.disc is not None:
            # channels-last weights are not contiguous, which safetensors refuses
            state = {name: value.contiguous() for name, value in self.disc.state_dict().items()}
            save_file(state, folder / DISCRIMINATOR)
        if self.optimizers is not None:
            torch.save(self.optimizers, folder / OPTIMIZERS)


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


def contents_of(nets) -> Contents:
    """What a checkpoint of a run's networks (utils.training.networks.Networks) holds."""
    optimizers = {name: trained.state_dict() for name, trained in nets.trained.items()}
    if nets.lecam:
        optimizers["lecam"] = nets.lecam.state_dict()
    return Contents(nets.vae, nets.ema.bn.stats(), nets.sit, nets.ema, nets.disc, optimizers)


def restore_training_state(nets, folder: Path) -> None:
    """Give built networks whatever else a checkpoint holds of the training: moments of the
    optimizers, loss scales, LeCam averages. The inverse of `contents_of`."""
    path = folder / OPTIMIZERS
    if not path.is_file():
        raise UserError(f"{folder} holds no optimizers (imported?): use run.init_from={folder}")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    missing = set(nets.trained) - set(state)
    if missing:
        raise UserError(
            f"{folder} has no optimizer state of {', '.join(sorted(missing))}: start a new run"
        )
    for name, trained in nets.trained.items():
        trained.load_state_dict(state[name])
    if nets.lecam and "lecam" in state:
        nets.lecam.load_state_dict(state["lecam"])


# --------------------------------------------------------------------------------------
# Written whole, or not at all.


def seal_checkpoint(final: Path, step: int, write: Callable[[Path], None], state: dict) -> Path:
    """Call `write(folder)` to fill a new checkpoint beside `final`, seal it with `state` and a hash
    of every file, and give it its name."""
    draft = final.with_name(UNFINISHED[0] + final.name)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write(draft)
        files = {str(p.relative_to(draft)): sha256_file(p) for p in files_below(draft)}
        sealed = {"step": step} | state | {"versions": versions(), "files": files}
        (draft / STATE).write_text(json.dumps(sealed, indent=1) + "\n")
        sync_tree(draft)
        if final.exists():  # not whole, or the run would have continued from it
            remove_checkpoint(final)
        draft.rename(final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(final.parent)
    return final


def remove_checkpoint(folder: Path) -> None:
    """Rename first, so that a kill cannot leave half a checkpoint under a valid name."""
    trash = folder.with_name(UNFINISHED[1] + folder.name)
    shutil.rmtree(trash, ignore_errors=True)
    shutil.rmtree(folder.rename(trash))


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


# --------------------------------------------------------------------------------------
# The checkpoints of one run.


class Checkpoints:
    """The checkpoints of one run, `RUN_DIR/checkpoints/0400000`; only one process may write.

    The newest `keep_last` are kept, and for ever those at multiples of `milestone_every` steps
    (0: none).
    """

    def __init__(self, run_dir: Path, keep_last: int = 3, milestone_every: int = 0):
        self.folder = run_dir / "checkpoints"
        self.keep_last, self.milestone_every = keep_last, milestone_every

    def save(self, step: int, write: Callable[[Path], None], state: dict) -> Path:
        """`seal_checkpoint` under the step's name; then delete those that are no longer kept."""
        final = seal_checkpoint(self.folder / f"{step:07d}", step, write, state)
        self._retire()
        return final

    def latest(self, report: Callable[[str], None] = print, read_all: bool = True) -> Path | None:
        """The newest whole checkpoint; `report` is called with a line for each one passed over.
        Without `read_all`, files must be there, but their bytes are not looked at."""
        for folder in sorted(self._all(), reverse=True):
            fault = find_fault(folder, read_all)
            if fault is None:
                return folder
            report(f"ignored {folder}: {fault}")
        return None

    def whole(self, report: Callable[[str], None] = print) -> list[Path]:
        """All whole checkpoints by step; `report` as in `latest`."""
        faults = {folder: find_fault(folder) for folder in sorted(self._all())}
        for folder, fault in faults.items():
            if fault is not None:
                report(f"ignored {folder}: {fault}")
        return [folder for folder, fault in faults.items() if fault is None]

    def sweep(self) -> None:
        """Delete what killed processes left half-written or half-deleted."""
        for folder in self.folder.glob(".*"):
            if folder.name.startswith(UNFINISHED):
                shutil.rmtree(folder, ignore_errors=True)

    def choose_start(
        self, resume: str, report: Callable[[str], None] = print, read_all: bool = True
    ) -> Path | None:
        """The checkpoint that `run.resume` (auto, never, or a folder) means; None = a new run.
        Raises `UserError` where the run's own checkpoints contradict it."""
        run = self.folder.parent
        if resume == "auto":
            return self.latest(report, read_all)
        if resume == "never":
            if self.latest(report, read_all):
                raise UserError(
                    f"{run} holds checkpoints and run.resume=never: choose another run.name"
                )
            return None
        chosen = Path(resume)
        fault = find_fault(chosen, read_all)
        if fault:
            raise UserError(f"run.resume={resume} is not a whole checkpoint: {fault}")
        newest = self.latest(report, read_all)
        if newest and newest.resolve() != chosen.resolve():  # `auto` would continue from that one
            raise UserError(
                f"{run} holds {newest.name} too: choose another run.name, or delete that"
            )
        return chosen

    def _all(self) -> list[Path]:
        return [p for p in self.folder.glob("[0-9]*") if p.is_dir() and p.name.isdigit()]

    def _retire(self) -> None:
        for folder in sorted(self._all())[: -self.keep_last]:
            if not self.milestone_every or int(folder.name) % self.milestone_every:
                remove_checkpoint(folder)


def find_start(resume: str, checkpoints: Checkpoints) -> tuple[Path | None, int]:
    """The checkpoint that `run.resume` means and its step, or (None, 0) for a new run; the same on
    every rank. The main process clears away what killed processes left half-written."""

    def find() -> tuple[Path | None, int]:
        checkpoints.sweep()
        checkpoint = checkpoints.choose_start(resume)
        step = json.loads((checkpoint / STATE).read_text())["step"] if checkpoint else 0
        return checkpoint, step

    ranks = Ranks()
    checkpoint, step = ranks.on_main(find)
    ranks.print(f"going on from {checkpoint}" if checkpoint else "starting a new run")
    return checkpoint, step
