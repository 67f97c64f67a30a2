"""What one check of the doctor says, and the rule by which checks are written.

A check is a generator of findings, decorated with `@check(name)`. It may return a value that a
later check takes as an argument (`value = yield from check_x(...)`). A `UserError` inside becomes a
failed finding, and the value is then None. No check loads weights, downloads or writes.
"""

from collections.abc import Callable, Generator, Iterator
from functools import partial, wraps
from typing import Any, NamedTuple

from models.checks.errors import UserError


class Finding(NamedTuple):
    """What a check found out; `name` is empty where it is the check's own."""

    status: str  # ok, warn, FAIL
    text: str  # a sentence: what is the case, and what to change
    name: str = ""


ok, warn, fail = (partial(Finding, status) for status in ("ok", "warn", "FAIL"))


def check(name: str) -> Callable:
    """Decorator of a check: names its findings, and turns a `UserError` into a failed one."""

    def decorate(function: Callable[..., Iterator[Finding]]):
        @wraps(function)
        def named(*args) -> Generator[Finding, None, Any]:
            findings = function(*args)
            try:
                while True:
                    finding = next(findings)
                    yield finding._replace(name=finding.name or name)
            except StopIteration as end:
                return end.value
            except UserError as error:
                yield fail(str(error), name)

        return named

    return decorate
