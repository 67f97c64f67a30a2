"""The frame around every script: arguments, and a user's mistake as one line with exit code 2."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import NoReturn

from models.errors import UserError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose help shows the script's docstring, with its example, and every
    default, and whose mistakes are one line."""

    def __init__(self, doc: str | None = None, **kwargs):
        super().__init__(description=doc, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands; the default behind each argument that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # nothing that a user could read as a value; 0 is one, though it equals False
        if action.default is None or action.default is False or action.default in ([], ()):
            return action.help
        return super()._get_help_string(action)


def answer_help(parse_args: Callable) -> None:
    """Parse the arguments before a script's slow imports (torch, diffusers), so that --help and a
    wrong argument are answered within a second. Stands between a script's parser and them.

    Of several ranks the first one answers. The others exit quietly with code 0: an error code would
    make the launcher kill the first one before it has printed its message.
    """
    if os.environ.get("RANK", "0") == "0":
        run_or_exit(parse_args)
        return
    try:
        with redirect_stdout(None):
            parse_args()
    except UserError:
        sys.exit(0)


def run_or_exit(function: Callable):
    """The value of `function()`; a `UserError` ends the program as one line, with exit code 2."""
    try:
        return function()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with its return value, or as `run_or_exit` does."""
    sys.exit(run_or_exit(main))


def positive(text: str) -> int:
    """Type of an argument: a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """--config and `key=value` overrides, for `parse_with_overrides`."""
    parser.usage = f"{parser.prog} [--config FILE] [options] [key=value ...]"
    parser.epilog = (
        "key=value overrides any setting, e.g. run.steps=1000 vae.train=false; all of them, with "
        "defaults and units: utils/config/schema.py"
    )
    parser.add_argument(
        "--config", action="append", default=[], metavar="FILE", help="YAML; several merge in order"
    )


def parse_with_overrides(parser: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Arguments, and in `overrides` every word that is none of them, for `load_config` to judge."""
    args, args.overrides = parser.parse_known_args(argv)
    return args
