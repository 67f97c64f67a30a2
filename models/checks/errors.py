"""The exception for what a user can mend, and words for its message."""

from collections.abc import Iterable
from typing import Any

SHOWN = 60  # characters of a wrong value in a message


class UserError(ValueError):
    """A wrong value, file or combination that the user can correct.

    The message is one line: the value, what was expected, and the remedy. Scripts print it
    without a traceback and exit with code 2 (see `utils.cli.run`). It may quote what a file of
    somebody holds: see `printable`.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(" ".join(map(str.strip, str(message).splitlines()))))


def printable(text: str) -> str:
    """`text` with escapes for line breaks, commands to a terminal and whatever else is no
    character to be seen."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


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


def short(error: Exception, length: int = 400) -> str:
    """An error as one line of at most about `length` characters; of torch's refusals to unpickle
    what was found, without the advice to load the file all the same."""
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    text = text.partition(" Check the documentation of torch.load")[0].partition(" Please use ")[0]
    return f"{type(error).__name__}: {text[:length]}{' ...' if len(text) > length else ''}"
