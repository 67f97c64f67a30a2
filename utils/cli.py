"""The frame around every script: a user's mistake ends in one line and exit code 2."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from models.errors import UserError
from utils.data import SOURCES, Source, open_source


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are one line, too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def positive(text: str) -> int:
    """Type of an argument: a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def add_source_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--data --path --resolution --split, for `open_source_of`."""
    add = parser.add_argument
    add("--data", choices=SOURCES, required=required, help="source of the images, as data.source")
    add("--path", help="folder of the source, as data.path")
    add("--resolution", type=positive, default=256, help="pixels the images come at (256)")
    add("--split", default="all", help="digits only: all, train or test")


def open_source_of(args: argparse.Namespace) -> Source:
    return open_source(args.data, args.path, args.resolution, args.split)


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its return value; print a `UserError` as one line, exit code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)
