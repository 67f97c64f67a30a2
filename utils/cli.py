"""The frame around every script: a user's mistake ends in one line and exit code 2."""

import sys
from collections.abc import Callable

from models.errors import UserError


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its return value; print a `UserError` as one line, exit code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)
