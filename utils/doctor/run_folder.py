"""Checks of the run's folder: what the run begins from, changed settings, disk for checkpoints."""

import json
import os
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from models.errors import UserError
from models.weights import require_match
from utils.checkpoint import SIT, STATE, VAE_FOLDER, WEIGHTS, Checkpoints
from utils.config.load import CONFIG_FILE, flat, read_saved_config
from utils.config.schema import Config
from utils.doctor.findings import Finding, check, fail, ok, warn
from utils.files import files_below, format_bytes, free_disk
from utils.training.cost import checkpoint_bytes
from utils.training.networks import Networks

# settings that a run may change when it continues
FREE_TO_CHANGE = ("run.steps", "run.out", "run.resume", "run.init_from")
SHOWN = 4  # changed settings that are named


@check("resume")
def check_resume(c: Config, nets: Networks | None) -> Generator[Finding, None, Path | None]:
    """The checkpoint that the run begins from, which is returned, fits `nets`; what has changed."""
    ignored: list[str] = []
    try:
        found = Checkpoints(c.run_dir).choose_start(c.run.resume, ignored.append, read_all=False)
    finally:
        yield from map(warn, ignored)
    start = found or (Path(c.run.init_from) if c.run.init_from else None)
    if start and nets:
        try:
            require_fit(nets, start)
        except UserError as error:
            yield fail(str(error))
            return start
    if not found:
        origin = f" with the weights of {start}" if start else ""
        yield ok(f"a new run in {c.run_dir}{origin}")
        return start
    step = json.loads((found / STATE).read_text())["step"]
    if step >= c.run.steps:
        advice = "raise run.steps to continue, or choose another run.name"
        yield warn(f"all {c.run.steps:,} steps are done ({found}): {advice}")
    else:
        yield ok(f"continues from {found}, step {step:,} of {c.run.steps:,}")
    if changed := changed_settings(c):
        shown = ", ".join(changed[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
        yield warn(f"this run began with {shown}: if that is not meant, choose another run.name")
    return start


def require_fit(nets: Networks, start: Path) -> None:
    """`UserError` unless SiT and VAE of a checkpoint have the shapes of this config."""
    for folder, net in ((SIT, nets.sit), (VAE_FOLDER, nets.vae.net)):
        path = start / folder / WEIGHTS
        if not path.is_file():
            raise UserError(f"{path} not found: {start} is no whole checkpoint; name another")
        try:
            with safe_open(path, "pt") as file:  # whose header alone is read
                shapes = {name: file.get_slice(name).get_shape() for name in list(file.keys())}
            there = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            require_match(net.state_dict(), there, path, "this config")
        except UserError as error:
            raise UserError(f"{error}; correct the config, or choose another run.name") from None


def changed_settings(c: Config) -> list[str]:
    """`key=old (now new)` for each setting that differs from config.yaml in the run's folder."""
    path = c.run_dir / CONFIG_FILE
    if not path.is_file():
        return []
    old, new = flat(asdict(read_saved_config(path))), flat(asdict(c))
    keys = [k for k in old if k not in FREE_TO_CHANGE and old[k] != new[k]]
    return [f"{k}={old[k]} (now {new[k]})" for k in keys]


@check("disk")
def check_disk(c: Config, nets: Networks | None) -> Iterator[Finding]:
    """There is room for the checkpoints that the run will keep, and for one being written."""
    run, out = c.run, c.run_dir
    place, free = free_disk(out)
    room = f"{format_bytes(free)} free in {place}"
    if not os.access(place, os.W_OK):
        yield fail(f"no right to write in {place}: choose another run.out")
    if nets is None:
        yield warn(f"{room}; what is needed is unknown, see `tokens` above")
        return
    each, kept = checkpoint_bytes(nets, c), kept_checkpoints(c)
    here = sum(file.stat().st_size for file in files_below(out / "checkpoints"))
    there = f", {format_bytes(here)} of them there already" if here else ""
    text = f"{kept} + 1 checkpoints of {format_bytes(each)}{there}; {room}"
    if each * (kept + 1) - here > free:
        yield fail(
            f"{text}: lower run.keep_last={run.keep_last}, set run.milestone_every=0 (now "
            f"{run.milestone_every}), or choose another run.out"
        )
    else:
        yield ok(text)


def kept_checkpoints(c: Config) -> int:
    """How many checkpoints remain at the end of the run: the last ones and the milestones."""
    run = c.run
    saved = sorted({*range(run.save_every, run.steps + 1, run.save_every), run.steps})
    milestones = [s for s in saved if run.milestone_every and s % run.milestone_every == 0]
    return len({*saved[-run.keep_last :], *milestones})
