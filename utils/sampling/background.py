"""Writing beside computing: a thread that writes what is finished while the device goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

# Calls that may wait or run: while one is written, the device makes the next.
MOST_PENDING = 2


class BackgroundWriter:
    """Calls `write` in one thread, in order, at most `MOST_PENDING` calls behind. For use in a
    `with` statement, which ends when all is written, also where its body was interrupted: what was
    handed over is not lost.

    An error of `write` is raised by the next `put`, or by the end of the statement; what is handed
    over after it is not written.
    """

    def __init__(self, write: Callable[..., None]):
        self.write = write
        self.pending: deque[Future] = deque()
        self.failed = False

    def put(self, *args) -> None:
        """Hand over the arguments of one call; waits while too many are pending."""
        while self.pending and (len(self.pending) >= MOST_PENDING or self.pending[0].done()):
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(self._write, *args))

    def _write(self, *args) -> None:
        if self.failed:
            return
        try:
            self.write(*args)
        except BaseException:
            self.failed = True
            raise

    def __enter__(self) -> BackgroundWriter:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.pool.shutdown()
        while self.pending and error is None:
            self.pending.popleft().result()
