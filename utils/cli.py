"""The frame around every script: its start and end, the types of its arguments, its outputs."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from math import nan
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import NamedTuple, NoReturn

from models.checks.errors import UserError
from models.checks.file_kinds import what_is
from utils.files import expand_path
from utils.process import heartbeat, installation
from utils.process.ending import is_main, run_or_exit
from utils.process.signals import SIGNALS, die_with_launcher, end_imports
from utils.process.written import Kind, check_kind
from utils.records import Range

LONGEST_NAME = 240  # bytes; file systems take 255, and drafts have longer names than their files


def _say_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None):
    """As `sys.excepthook`, for the imports of a program: a package that is not installed is said in
    one line."""
    line = installation.explain(error) if isinstance(error, ModuleNotFoundError) else ""
    if not line:
        sys.__excepthook__(kind, error, trace)
        return
    print(line, file=sys.stderr)
    sys.exit(2)


sys.excepthook = _say_missing


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


def answer_help(parse_args: Callable, saves: bool = False) -> None:
    """Parse the arguments before a script's slow imports (torch, diffusers), so that --help and a
    wrong argument are answered within a second, and so is a Python without the packages. Stands
    between a script's parser and them.

    Of several ranks the first one answers. The others exit quietly with code 0: an error code would
    make the launcher kill the first one before it has printed its message. `saves`: whether the
    program answers signals by saving, see `Signals`; imports have nothing to save.
    """
    for number in SIGNALS if saves else (signal.SIGINT,):
        signal.signal(number, end_imports)
    die_with_launcher()
    if not {"-h", "--help"} & set(sys.argv[1:]):
        run_or_exit(installation.require_torch)
    if is_main():
        run_or_exit(parse_args)
        return
    try:
        with redirect_stdout(None):
            parse_args()
    except UserError:
        sys.exit(0)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with its return value, or as `run_or_exit` does."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is end_imports:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run_or_exit(main)
    if heartbeat.current:
        run_or_exit(heartbeat.current.meet)
    sys.exit(code)


# --------------------------------------------------------------------------------------
# Types of arguments.


def number(kind: type[int] | type[float], **sides: float) -> Callable[[str], int | float]:
    """Type of an argument: a finite number in the `Range` of `sides`. 1e3 is a whole number."""
    allowed = Range(**sides)

    def convert(text: str) -> int | float:
        exact = kind is int and text.strip().lstrip("+-").isdecimal()
        try:
            value = int(text) if exact else float(text)
            if kind is int and not exact:
                value = int(value) if int(value) == value else nan
        except (ValueError, OverflowError):  # OverflowError: inf
            value = nan
        if value not in allowed:
            what = "a whole number" if kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what} {allowed}".rstrip())
        return value

    return convert


# the types that most numbers have
positive, not_negative = number(int, at_least=1), number(int, at_least=0)


def path(text: str) -> str:
    """Type of an argument: `expand_path`."""
    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def file_path(text: str) -> Path:
    """`path` as a `Path`, for an argument; "." as the folder that it is, which has a name."""
    found = Path(path(text))
    return found if found.name else found.absolute()


def hub_name(text: str) -> str:
    """For `type` of an argument: OWNER/NAME of a repository on the Hugging Face hub."""
    if not re.fullmatch(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r}: expected OWNER/NAME")
    return text


def check_output(flag: str, out: Path, kind: Kind, inputs: Iterable[object] = ()) -> None:
    """`UserError` unless a file of this kind can be written at `out`: what stands there may only be
    one that this program has written, and none of the `inputs`, nor lie in one that is a folder.
    Creates nothing; called before the work whose result goes there."""
    _check_place(flag, out)
    if out.is_dir():
        raise UserError(f"{flag} {out} is a folder: expected the name of a file to write")
    if out.is_symlink() and not out.exists():
        raise UserError(f"{flag} {out} is {what_is(out)}: choose another name")
    if out.exists() and not out.is_file():
        raise UserError(f"{flag} {out} is no regular file: choose another name")
    if out.is_file() and not os.access(out, os.W_OK):
        raise UserError(f"{flag} {out} exists and may not be overwritten: choose another name")
    refuse_inputs(flag, out, inputs)
    check_kind(flag, out, kind)


def refuse_inputs(flag: str, out: Path, inputs: Iterable[object]) -> None:
    """`UserError` if an output is one of the inputs, under whatever name, or would lie inside one;
    a run takes new files beside its checkpoints."""
    for given in (Path(str(each)) for each in inputs if each is not None):
        is_run = (given / "config.yaml").is_file() or any(given.glob("checkpoints/[0-9]*"))
        closed = given / "checkpoints" if is_run else given
        if same_place(out, given):
            raise UserError(f"{flag} {out} is {given}, an input: choose another name")
        if is_inside(out, closed):
            raise UserError(f"{flag} {out} lies inside the input {given}: choose another place")


def check_input(flag: str, given: Path | None, folder: bool = False) -> None:
    """`UserError` unless a file (or a folder) that the user has named, if any, is one."""
    wanted = "folder" if folder else "file"
    if given is None or (given.is_dir() if folder else given.is_file()):
        return
    found = what_is(given)
    if found == "absent":
        raise UserError(f"{flag} {given}: no such {wanted}; correct the path")
    raise UserError(f"{flag} {given} is {found}, expected a {wanted}: correct the path")


def check_output_folder(flag: str, out: Path, inputs: Iterable[object] = ()) -> None:
    """`UserError` unless a folder can be made at `out`, or is there and can be written to, and is
    none of the inputs, nor inside one."""
    _check_place(flag, out, folder=True)
    refuse_inputs(flag, out, inputs)


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths, which need not exist, name the same file: also by a link of any kind, or
    in other letters where case does not count."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them is not there
        return False


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, which need not exist, is or lies below a folder that is there: by its name,
    or where its links lead."""
    places = [Path(os.path.abspath(path)), Path(os.path.realpath(path))]
    above = {each for place in places for each in (place, *place.parents)}
    return folder.is_dir() and any(same_place(each, folder) for each in above)


def _check_place(flag: str, out: Path, folder: bool = False) -> None:
    """`UserError` unless a file can be created at `out`, or below it if that is a `folder`, judging
    by the folders that are there."""
    file = out / "file" if folder else out
    try:
        if len(os.fsencode(out.name)) > LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        place = next(a for a in file.absolute().parents if os.path.lexists(a))
        file.exists()  # raises where a loop of links or the length of the whole path is in the way
    except OSError as error:
        shown = str(out) if len(str(out)) < 200 else f"{str(out)[:200]}..."
        raise UserError(f"{flag} {shown}: {error.strerror}; choose another name") from None
    if not place.is_dir():
        raise UserError(f"{flag} {out}: {place} is no folder: choose another place")
    try:
        with TemporaryFile(dir=place):  # it has no name, and nothing stays
            pass
    except OSError as error:
        why = f"cannot write in {place} ({error.strerror})"
        raise UserError(f"{flag} {out}: {why}; choose another place") from None


class SourceWords(NamedTuple):
    """How a program's user names a data source in its arguments, so that messages from below can
    speak of these: each is a text with {} for the value."""

    source: str  # the kind of the data
    path: str
    resolution: str
    split: str
    labels: str = "what scripts/prepare_data.py --labels {} packs"


SETTINGS = SourceWords(
    "data.source={}", "data.path={}", "data.resolution={}", "data.split={}", "data.labels={}"
)  # of train_repae.py
FLAGS = SourceWords("--data {}", "--path {}", "--resolution {}", "--split {}", "--labels {}")


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


def add_export_arguments(parser: argparse.ArgumentParser, checkpoint: str, record: str) -> None:
    """CHECKPOINT OUT --evaluation --push-to-hub. `checkpoint`: what the first may be; `record`: the
    command that writes the file of --evaluation."""
    add = parser.add_argument
    add("checkpoint", type=file_path, metavar="CHECKPOINT", help=checkpoint)
    what = "folder to write; must not exist, or be empty"
    add("out", type=file_path, metavar="OUT", help=what)
    what = f"record of `{record}`, for the card"
    add("--evaluation", type=file_path, metavar="FILE", help=what)
    what = "also upload OUT to this repository of the hub"
    add("--push-to-hub", type=hub_name, metavar="ID", help=what)


def parse_with_overrides(parser: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Arguments, and in `overrides` every word that is none of them, for `load_config` to judge."""
    args, args.overrides = parser.parse_known_args(argv)
    return args
