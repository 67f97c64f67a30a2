"""What a run may change when it goes on from a checkpoint, and what it has changed."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from models.checks.errors import UserError
from utils.config.schema import Config, all_settings

# What a change of a setting means, by names and patterns of names. A setting that none of the four
# lists names defines the run: to change it makes another experiment, and a resumed run is refused
# it unless run.allow_change names it.

# The machine, the length and the reports. What is learned up to a given step does not depend on
# them: a resumed run may change them, and runs that differ in them are the same experiment.
FREE = (
    *("run.name", "run.out", "run.steps", "run.resume", "run.allow_change"),
    *("run.accumulation", "run.compile", "run.compile_mode", "run.checkpointing"),
    *("run.channels_last", "run.shard_optimizer", "run.bucket_mb"),
    *("run.on_nonfinite", "run.max_nonfinite", "run.rank_timeout", "run.disk_wait"),
    *("run.log_every", "run.save_every", "run.keep_last", "run.milestone_every", "run.trackers"),
    *("data.workers", "data.max_bad_images", "preview.*", "eval.*"),
)
# How a run is steered: a resumed run may change them, but that makes another experiment.
STEERING = ("*.optim.*", "run.skip_steps")
# A repetition: runs that differ in them are the same experiment, but not the same run.
REPETITION = ("run.seed", "data.source", "data.path", "data.latents", "encoder.cached")
# What a run starts with: without effect later, so that a resumed run cannot change them at all.
STARTING = ("run.init_from", "run.init_new", "vae.name", "vae.weights", "disc.weights")
STARTING += ("latent_norm.stats_images",)

# No settings, but they can be named in run.allow_change: the names of the classes, in order, and
# what the images and the labels hold.
CLASSES, CONTENT = "data.classes", "data.content"
MOST_SHOWN = 60  # characters of a value in a message
MOST_LISTED = 8  # changes in a message


def is_in(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_same_experiment(name: str) -> bool:
    """Whether runs that differ in this setting alone are repetitions of each other."""
    return is_in(name, (*FREE, *REPETITION))


def defining_settings(config: Config) -> dict[str, Any]:
    """{full name: value} of the settings that are not `FREE`: what a checkpoint records."""
    return {name: value for name, _, value in all_settings(config) if not is_in(name, FREE)}


def changed_settings(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """{full name: (old value, new value)} of every setting that differs, in their order."""
    before = {name: value for name, _, value in all_settings(old)}
    after = {name: value for name, _, value in all_settings(new)}
    return {n: (before[n], value) for n, value in after.items() if before[n] != value}


def require_resumable(
    old: Config,
    new: Config,
    old_classes: Sequence[str] | None = None,
    new_classes: Sequence[str] | None = None,
    old_content: Mapping[str, str] | None = None,
    new_content: Mapping[str, str] | None = None,
) -> dict[str, tuple[Any, Any]]:
    """`changed_settings` since a checkpoint was written, and CLASSES and CONTENT if they have
    changed.

    old: what the run had recorded; new: what it goes on with; likewise the names of the classes,
    and the hashes of what the data hold, if they are known. `UserError` for changes that
    `new.run.allow_change` does not allow.
    """
    changed = changed_settings(old, new)
    if old_classes is not None and new_classes is not None:
        changed |= _changed_classes(old_classes, new_classes)
    changed |= _changed_content(old_content or {}, new_content or {})
    fixed = [name for name in changed if is_in(name, STARTING)]
    if fixed:
        raise UserError(
            f"a run that goes on cannot change what it started with: {_listed(changed, fixed)}; "
            "set it back, or start a new run under another run.name"
        )
    allowed = (*FREE, *STEERING, *new.run.allow_change)
    refused = [name for name in changed if not is_in(name, allowed)]
    if refused:
        raise UserError(
            f"this run began with other settings: {_listed(changed, refused)}; set them back, "
            f"choose another run.name, or allow it by run.allow_change=[{','.join(refused)}]"
        )
    return changed


def _changed_classes(old: Sequence[str], new: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """The number of classes or the first name that differs, {} if all are the same."""
    if len(old) != len(new):
        return {CLASSES: (f"{len(old)} classes", f"{len(new)} classes")}
    numbered = enumerate(zip(old, new))
    differing = ((f"{i} = {a!r}", f"{i} = {b!r}") for i, (a, b) in numbered if a != b)
    first = next(differing, None)
    return {CLASSES: first} if first else {}


def _changed_content(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """The first hash that differs, {} if none does of those that both know."""
    differing = (name for name in old if name in new and old[name] != new[name])
    first = next(differing, None)
    if first is None:
        return {}
    what = first.removesuffix("_sha256")
    return {CONTENT: (f"{first} {old[first][:8]}", f"{new[first][:8]}: other {what} than then")}


def _listed(changed: dict[str, tuple[Any, Any]], names: Sequence[str]) -> str:
    lines = [change_line(name, *changed[name]) for name in names[:MOST_LISTED]]
    more = len(names) - len(lines)
    return ", ".join(lines) + (f", and {more} more" if more else "")


def change_line(name: str, old: Any, new: Any) -> str:
    """One change in words."""
    return f"{name}={_short(old)} (now {_short(new)})"


def _short(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
