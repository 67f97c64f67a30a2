"""Kinds of settings: a choice of names, a path, a number of steps."""

from collections.abc import Iterable
from dataclasses import field
from typing import Any

MOST_STEPS = 10**9
# What may be new in the networks of a run that begins with a checkpoint of another one.
INIT_NEW = ("projectors", "classes", "pos_embed", "disc")


def choice(default: str, names: Iterable[str]) -> Any:
    """A text that is one of `names`."""
    return field(default=default, metadata={"choices": tuple(names)})


def path_or(default: str | None, prefix: str = "") -> Any:
    """A text that is a path, or may be one: `~` and `$VARIABLES` in it are expanded when it is
    read. A path may stand behind what the regular expression `prefix` matches."""
    return field(default=default, metadata={"path": prefix})
