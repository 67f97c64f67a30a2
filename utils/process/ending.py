"""How a program ends: a user's mistake is one line and exit code 2, said once by all ranks."""

import errno
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from models.checks.errors import UserError
from utils.process import heartbeat, installation
from utils.process.heartbeat import NOTHING_TO_SAVE, Stopped

WAIT_FOR_MAIN = 5.0  # s that a rank leaves the main process to report the same mistake
# errors of the system that are no fault of this program
ENVIRONMENT = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV),
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.ENOTDIR),
    *(errno.EISDIR, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN, errno.EBUSY),
}


def run_or_exit(function: Callable):
    """The value of `function()`. A user's mistake, a disk that is full or gone, and Ctrl-C end the
    program as one line; no rank waits for one that failed."""
    try:
        value = function()
        sys.stdout.flush()
        return value
    except BaseException as error:
        _end_by(error)
        raise


def say(line: str) -> None:
    """Print to stderr, on a line of its own also beside a progress bar."""
    tqdm = sys.modules.get("tqdm.std")
    for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm else ():
        bar.leave = True
        bar.close()  # ends its line
    print(line, file=sys.stderr, flush=True)


def _explain(error: BaseException) -> tuple[int, str] | None:
    """(exit code, line) of an error that is not ours; None for a fault of this program."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return 2, f"error: {text}"
    if isinstance(error, Stopped):
        return 0, NOTHING_TO_SAVE
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, BrokenPipeError):  # of `| head`
        return 141, ""
    if isinstance(error, ModuleNotFoundError) and (line := installation.explain(error)):
        return 2, line
    if isinstance(error, OSError) and error.errno in ENVIRONMENT:
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"error: {where}{error.strerror}"
    if "DataLoader worker" in text and "exited unexpectedly" in text:
        return 1, "error: a loader process was killed (out of memory?); the same command goes on"
    return None


def _end_by(error: BaseException) -> None:
    """End the program because of `error`, or return if it is to be raised."""
    if isinstance(error, SystemExit):
        if heartbeat.current:
            exit_now(error.code if isinstance(error.code, int) else 1)
        return
    known = _explain(error)
    if heartbeat.current:
        _end_all_ranks(error, known)
    if known is None:
        return
    code, line = known
    if code == 2 and not is_main():
        time.sleep(WAIT_FOR_MAIN)  # which is about to say the same; its launcher then ends this one
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if line and (code or is_main()):
        say(line)
    sys.exit(code)


def _end_all_ranks(error: BaseException, known: tuple[int, str] | None) -> NoReturn:
    """End this rank, and tell the others why: each mistake is printed once."""
    beat = heartbeat.current
    assert beat is not None
    code, line = known or (1, f"{type(error).__name__}: {error}")
    if isinstance(error, Stopped) and not beat.loss:
        beat.tell_stopped()
        if beat.rank == 0:
            say(line)
        exit_now(0)
    mistake = code == 2
    if not beat.tell_failure(line.removeprefix("error: "), 2 if mistake else 1):
        if mistake and beat.loss and beat.loss.code == 2 and beat.rank == 0:
            say(line)  # the same mistake, first reported by another rank
            exit_now(code)
        beat.end()
    if known is None:
        say("".join(traceback.format_exception(error)).rstrip())
    elif beat.rank == 0:
        say(line)
    # rank 0 says the mistake of another rank; a code that is not 0 would make the launcher kill it
    exit_now(0 if mistake and beat.rank else code)


def exit_now(code: int) -> NoReturn:
    """End now, without waiting for a process group that may have lost its members."""
    for function in [*heartbeat.at_exit]:
        function()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def is_main() -> bool:
    """Whether this is rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"
