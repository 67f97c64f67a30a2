"""Checks of the run's folder: what the run begins from, changed settings, disk for checkpoints."""

from collections.abc import Generator, Iterator

from utils.config import resuming
from utils.config.load import CONFIG_FILE, read_saved_config
from utils.config.schema import Config
from utils.cost.memory import checkpoint_bytes
from utils.data.base import Source
from utils.doctor.findings import Finding, check, fail, ok, warn
from utils.files import files_below, format_bytes, free_disk
from utils.run_lock import check_unlocked
from utils.training.networks import Networks
from utils.training.plan import Start, changes_since, check_run_folder, starting_point

SHOWN = 4  # changed settings that are named


@check("resume")
def check_resume(c: Config, source: Source | None) -> Generator[Finding, None, Start | None]:
    """The run's folder can be written to; the checkpoint that the run begins with, which is
    returned; what has changed."""
    check_run_folder(c)
    check_unlocked(c.run_dir)
    ignored: list[str] = []
    try:
        found = starting_point(c, ignored.append, read_all=False)
    finally:
        yield from map(warn, ignored)
    if not found.checkpoint:
        origin = f" with the weights of {found.origin}" if found.origin else ""
        yield ok(f"a new run in {c.run_dir}{origin}")
        return found
    if found.step >= c.run.steps:
        advice = "raise run.steps to continue, or choose another run.name"
        yield warn(f"all {c.run.steps:,} steps are done ({found.checkpoint}): {advice}")
    else:
        yield ok(f"continues from {found.checkpoint}, step {found.step:,} of {c.run.steps:,}")
    changes_since(c, found, source)
    if changed := changed_settings(c):
        shown = ", ".join(changed[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
        yield warn(f"this run began with {shown}: if that is not meant, choose another run.name")
    return found


def changed_settings(c: Config) -> list[str]:
    """`key=old (now new)` for each setting that differs from config.yaml in the run's folder, but
    for those that change nothing of what is learned."""
    path = c.run_dir / CONFIG_FILE
    if not path.is_file():
        return []
    changed = resuming.changed_settings(read_saved_config(path), c)
    names = [name for name in changed if not resuming.is_in(name, resuming.FREE)]
    return [resuming.change_line(name, *changed[name]) for name in names]


@check("disk")
def check_disk(c: Config, nets: Networks | None) -> Iterator[Finding]:
    """There is room for the checkpoints that the run will keep, and for one being written."""
    run, out = c.run, c.run_dir
    place, free = free_disk(out)
    room = f"{format_bytes(free)} free in {place}"
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
