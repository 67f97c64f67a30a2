"""The range of a numeric setting, declared beside its default."""

from dataclasses import field
from math import inf, isfinite
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The finite numbers a setting may take; an infinite side is open."""

    at_least: float = -inf
    above: float = -inf
    at_most: float = inf
    below: float = inf

    def __contains__(self, value: float) -> bool:
        inside = self.at_least <= value <= self.at_most and self.above < value < self.below
        return isfinite(value) and inside

    def __str__(self) -> str:
        sides = {name.replace("_", " "): side for name, side in self._asdict().items()}
        return " and ".join(f"{name} {side:g}" for name, side in sides.items() if isfinite(side))


def number(default: float | None, **sides: float) -> Any:
    """A field with a default and the range of `sides`, e.g. `number(0.1, at_least=0, below=1)`;
    with the default None the setting may also be null."""
    return field(default=default, metadata={"range": Range(**sides)})
