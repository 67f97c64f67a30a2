"""The frame around every script: a user's mistake ends in one line and exit code 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from models.errors import UserError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are one line, too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its return value; print a `UserError` as one line, exit code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)
