"""Typed records: dataclasses whose fields declare what they may hold, and JSON files read as such.

For example:

    @dataclass
    class Plan:
        resolution: int = number(at_least=1)
        classes: list[str]

    plan = load_record(folder / "plan.json", Plan, "make the folder again")

Which types are known is said at `models.checks.values.convert`. The settings of a run
(utils/config/schema.py) declare their ranges in the same way.
"""

from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, TypeVar

from models.checks.errors import UserError
from models.checks.values import Range, RecordError, convert
from utils.files import read_json

__all__ = ["Range", "RecordError", "load_record", "number", "parse_record"]

Record = TypeVar("Record")


def number(default: Any = MISSING, **sides: float) -> Any:
    """A numeric field with the range of `sides`, e.g. `number(0.1, at_least=0, below=1)`; with the
    default None it may also be null. Of a list, a tuple or a dict of numbers, each must be in the
    range."""
    return field(default=default, metadata={"range": Range(**sides)})


def load_record(path: Path, kind: type[Record], remedy: str) -> Record:
    """The record of the dataclass `kind` in a JSON file. Fields that `kind` does not have are left
    out. Raises `UserError` ending in `remedy` if the file is absent, is no JSON or does not fit."""
    content = read_json(path, remedy)
    try:
        return parse_record(content, kind)
    except RecordError as error:
        raise UserError(f"{path}: {error}; {remedy}") from None


def parse_record(value: object, kind: type[Record], name: str = "") -> Record:
    """`value`, as json.loads gives it, as a record of the dataclass `kind`; else `RecordError`.
    `name`: what the value is called in the message."""
    return convert(value, kind, name)
