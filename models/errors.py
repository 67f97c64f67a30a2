"""What a user can get wrong: the exception for it, what a file is in words, JSON files, and values
that do not have the type or the range that is expected of them.

This module imports neither torch nor anything of the project.
"""

import codecs
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from math import inf, isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """A wrong value, file or combination that the user can correct.

    The message is one line: the value, what was expected, and the remedy. Scripts print it
    without a traceback and exit with code 2 (see `utils.cli.run`).
    """


# --------------------------------------------------------------------------------------
# Files.

SAFETENSORS, PYTORCH, OLD_PYTORCH = (
    "a safetensors file", "a PyTorch file", "a PyTorch file of the format before 1.6"
)  # fmt: skip
PICKLE = "a Python pickle"
PICKLES = (PYTORCH, OLD_PYTORCH, PICKLE)
# a path of these is not a regular file, and is never opened
PLACES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# first bytes => what such a file is
BEGINNINGS = {
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.": OLD_PYTORCH,
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or a RIFF file",
    b"%!PS": "a PostScript file",
    b"\xc5\xd0\xd3\xc6": "a PostScript file",
    b"%PDF": "a PDF file",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x7fELF": "a program",
    b"version https://git-lfs": "a pointer of Git LFS (run `git lfs pull`)",
    **{bytes([0x80, protocol]): PICKLE for protocol in range(2, 6)},
}
# what the first KiB of a zip archive names => what it is
ZIPPED = {b"data.pkl": PYTORCH, b".npy": "a NumPy archive (.npz)"}


def what_is(path: str | os.PathLike) -> str:
    """What stands at `path`, as words that follow "it is": "absent", "a folder", "a FIFO", "an
    empty file", "a zip archive", "a text file", ...

    Reads at most the first KiB, and opens regular files alone: it never waits, nor raises.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind != stat.S_IFREG:
            return PLACES.get(kind, "something that is no file")
        with open(path, "rb") as file:
            return _what_begins_with(file.read(1024))
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if os.path.islink(path) else "absent"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"unreadable ({getattr(error, 'strerror', None) or error})"


def _what_begins_with(head: bytes) -> str:
    """What a file is whose first KiB is `head`."""
    if not head:
        return "an empty file"
    if head.startswith(b"PK"):
        zipped = "an empty zip archive" if head.startswith(b"PK\x05\x06") else "a zip archive"
        return next((words for mark, words in ZIPPED.items() if mark in head), zipped)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return SAFETENSORS
    if head[257:262] == b"ustar":
        return "a tar archive"
    found = next((words for mark, words in BEGINNINGS.items() if head.startswith(mark)), None)
    return found or _kind_of_text(head)


def _kind_of_text(head: bytes) -> str:
    try:  # the last character may be cut
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip()
    except UnicodeDecodeError:
        return "a binary file of no known kind"
    if "\0" in text:
        return "a binary file of no known kind"
    if text.lower().startswith(("<!doctype html", "<html")):
        return "an HTML page"
    return "a JSON file" if text.startswith(("{", "[")) else "a text file"


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file; one that is absent, unreadable or no JSON is a `UserError` ending
    in `remedy`."""
    if not os.path.isfile(path):
        kind = what_is(path)
        why = "not found" if kind == "absent" else f"is {kind}, expected a JSON file"
        raise UserError(f"{path} {why}; {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:  # no right to read it, a disk that fails
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        why = f"it is {what_is(path)}: {error}"
        raise UserError(f"{path} is no valid JSON ({why}); {remedy}") from None


# --------------------------------------------------------------------------------------
# Values.

WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false",
         dict: "an object", list: "a list"}  # fmt: skip
SHOWN = 60  # characters of a wrong value in a message
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


def same_letters(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that has the letters and digits of `word`, in whatever order and case: a
    slip of the hand, never the name of something else. None if there is none, or several."""

    def key(text: str) -> list[str]:
        return sorted(filter(str.isalnum, text.lower()))

    found = [name for name in known if key(name) == key(word)]
    return found[0] if len(found) == 1 else None


def shown(value: Any) -> str:
    """A value for a message: its repr in one line, cut."""
    try:
        text = " ".join(map(str.strip, repr(value).splitlines()))
    except (ValueError, RecursionError):  # more digits, or deeper lists, than Python prints
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
