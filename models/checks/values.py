"""Values of the types and ranges that are expected: of settings, records and configs."""

from dataclasses import MISSING, fields, is_dataclass
from math import inf, isfinite
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from models.checks.errors import UserError, shown

WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false",
         dict: "an object", list: "a list"}  # fmt: skip
LARGEST = 2**63  # magnitude of a number without a range of its own, exclusive


class Range(NamedTuple):
    """The finite numbers that a field may hold; an infinite side is open."""

    at_least: float = -inf
    above: float = -inf
    at_most: float = inf
    below: float = inf

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        # a whole number may be too large for a float, hence for isfinite
        if abs(value) >= LARGEST if isinstance(value, int) else not isfinite(value):
            return False
        inside = self.at_least <= value <= self.at_most and self.above < value < self.below
        return inside

    def __str__(self) -> str:
        sides = {name.replace("_", " "): side for name, side in self._asdict().items()}
        return " and ".join(f"{name} {side:g}" for name, side in sides.items() if isfinite(side))


class RecordError(UserError):
    """A value that does not fit its record; the message names the field, the value and what is
    expected."""


def convert(value: Any, kind: Any, name: str = "", allowed: Range = Range()) -> Any:  # noqa: B008
    """`value`, as json.loads gives it, as the type `kind`, with every number in `allowed`; else
    `RecordError`, which calls it `name`.

    `kind`: Any, bool, int, float, str, a `Literal`, a dataclass, and lists, tuples, dicts with text
    keys and unions of these. A float field takes whole numbers; true is no number. Fields that a
    dataclass does not have are left out. Another annotation is a fault of ours: TypeError.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _fill(value, kind, name)
    if origin in (Union, UnionType):
        return _one_of(value, args, name, allowed)
    if origin is Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            raise _wrong(value, name, f"one of {', '.join(map(str, args))}")
        return value
    if kind in (dict, list, tuple) or origin in (dict, list, tuple):
        return _container(value, origin or kind, args, name, allowed)
    if kind in (int, float):
        fits = type(value) is int or (kind is float and type(value) is float)
        if not fits or value not in allowed:
            raise _wrong(value, name, " ".join(filter(None, (WORDS[kind], str(allowed)))))
        return kind(value)
    if kind not in (bool, str):
        raise TypeError(f"{name}: records know no annotation {kind}")
    _require(value, kind, name)
    return value


def _one_of(value: Any, kinds: tuple, name: str, allowed: Range) -> Any:
    """`value` as the first of `kinds` that it fits; the error is that of the last one."""
    if value is None and NoneType in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not NoneType)
    for kind in others:
        try:
            return convert(value, kind, name, allowed)
        except RecordError:
            pass
    return convert(value, last, name, allowed)


def _container(value: Any, kind: type, args: tuple, name: str, allowed: Range) -> Any:
    """A dict, list or tuple whose items are of the types `args`; () = of any."""
    if kind is dict:
        _require(value, dict, name)
        inner = args[1] if args else Any
        if not all(isinstance(key, str) for key in value):
            raise _wrong(value, name, "texts as keys")
        return {k: convert(v, inner, _join(name, k), allowed) for k, v in value.items()}
    _require(value, list, name)
    # `tuple[int]` is read as `tuple[int, ...]`, as diffusers means it
    kinds = [arg for arg in args or (Any,) if arg is not Ellipsis]
    if len(kinds) == 1:
        # all at once, since there may be a million
        if kinds[0] is str and set(map(type, value)) == {str}:
            return kind(value)
        ints = kinds[0] is int and set(map(type, value)) == {int}
        if ints and min(value) in allowed and max(value) in allowed:
            return kind(value)
        kinds *= len(value)
    if len(kinds) != len(value):
        raise _wrong(value, name, f"a list of {len(kinds)}")
    pairs = enumerate(zip(value, kinds))
    return kind(convert(item, of, f"{name}[{i}]", allowed) for i, (item, of) in pairs)


def _fill(value: Any, kind: Any, name: str) -> Any:
    """A record of the dataclass `kind` with the fields of the object `value`."""
    _require(value, dict, name)
    hints, found = get_type_hints(kind), {}
    for declared in fields(kind):
        place = _join(name, declared.name)
        if declared.name in value:
            allowed = declared.metadata.get("range") or Range()
            found[declared.name] = convert(
                value[declared.name], hints[declared.name], place, allowed
            )
        elif declared.default is MISSING and declared.default_factory is MISSING:
            raise RecordError(f"{place} is missing")
    return kind(**found)


def _require(value: Any, kind: type, name: str) -> None:
    if type(value) is not kind:
        raise _wrong(value, name, WORDS[kind])


def _wrong(value: Any, name: str, expected: str) -> RecordError:
    return RecordError(f"{f'{name}=' if name else ''}{shown(value)}: expected {expected}")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
