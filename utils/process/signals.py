"""What SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 do, and the death of the launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from utils.process import heartbeat
from utils.process.ending import exit_now, is_main, say
from utils.process.heartbeat import NOTHING_TO_SAVE, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # that ask a program to end
TWICE = 0.2  # s; two SIGINTs that come closer than this are one
PR_SET_PDEATHSIG = 1  # of prctl(2)


class Signals:
    """What SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 do to a program that saves before it ends.

    While `raises` is set, as it is at first, a signal raises `Stopped` in the main thread; if that
    hangs outside Python, the process ends. Once the program has cleared it, a signal is noted in
    `received`. A second SIGINT ends the process at once. For use in a `with` statement.
    """

    def __init__(self) -> None:
        self.received, self.raises, self.interrupted = False, True, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # it takes no signals
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        self._fd_before = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
        threading.Thread(target=self._guard, args=(self._out,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        if not self._before:
            return
        self.raises = False
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._in)  # ends the thread
        for number, handler in self._before.items():
            later = signal.SIG_DFL if handler is end_imports else handler
            signal.signal(number, later)  # type: ignore[arg-type]

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.interrupted and now - self.interrupted > TWICE:
            print(file=sys.stderr)
            exit_now(130)
        if number == signal.SIGINT:
            self.interrupted = self.interrupted or now
        first, self.received = not self.received, True
        if first and self.raises:
            raise Stopped

    def _guard(self, pipe: int) -> None:
        """In a thread: a main thread that waits in C runs no handler."""
        with open(pipe, "rb", buffering=0) as numbers:
            while data := numbers.read(64):
                if not set(data) & set(SIGNALS):
                    continue
                end = time.monotonic() + heartbeat.GRACE
                while self.raises and not self.received and time.monotonic() < end:
                    time.sleep(0.1)
                if self.raises and not self.received:
                    if heartbeat.current:
                        heartbeat.current.tell_stopped()
                    if is_main():
                        say(NOTHING_TO_SAVE)
                    exit_now(0)


def end_imports(number: int, frame) -> None:
    """During imports nothing has begun."""
    saves = signal.getsignal(signal.SIGTERM) is end_imports
    if is_main():
        say(NOTHING_TO_SAVE if saves else "interrupted")
    exit_now(0 if saves else 130)


def die_with_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies, so that no rank goes on alone."""
    parent = os.getppid()
    if not (sys.platform == "linux" and _is_launcher(parent)):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGTERM)


def _is_launcher(pid: int) -> bool:
    """Whether a process is `accelerate launch` or torchrun."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in words for name in (b"accelerate", b"torchrun", b"torch.distributed"))
