"""One writer for a run's folder: a kernel lock on RUN_DIR/.lock, which says who holds it.

The kernel frees the lock when its process ends, however it ends; so on the same host a lock that is
free and still names a holder is stale. Locks do not reach from host to host on every file system:
what another host has written stays valid until that run, or the user, deletes it.
"""

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from models.checks.errors import UserError
from models.checks.values import RecordError
from utils.files import reason
from utils.process import heartbeat
from utils.records import number, parse_record

LOCK = ".lock"
# a link would let us write into a file of somebody else, a FIFO would wait for a reader
FLAGS = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
# how long the loader workers of a killed run, which hold its lock too, may take to end
SECONDS = 15
# what the kernel answers on file systems without such locks
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass
class Holder:
    """Who writes a run's folder."""

    host: str
    started: str
    pid: int = number(at_least=1)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"

    def is_alive(self) -> bool:
        """Whether there is such a process on this host."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return True


class RunLock:
    """The lock of one run's folder. It is taken by `acquire`, and let go at the end of a `with`."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.path = run_dir, run_dir / LOCK
        now = datetime.now().isoformat(" ", "seconds")
        self.me = Holder(socket.gethostname(), now, os.getpid())
        self.handle: int | None = None
        self.wanted = False  # between `acquire` and `release`

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, for which the folder is made. `UserError` if another run has it, or if
        nothing can be written here; then nothing has been touched."""
        if self.wanted:
            return
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise UserError(
                f"cannot write in {self.run_dir} ({reason(error)}): make room, or choose another "
                "run.out"
            ) from None
        self.wanted = True
        heartbeat.at_exit.append(self.release)

    def renew(self) -> None:
        """Before a write: take the lock again if somebody has deleted it, even with the whole
        folder. OSError if that is not possible, also where another run has begun there."""
        if self.wanted and not self._is_mine():
            self._close()
            self.run_dir.mkdir(exist_ok=True)  # not its parents: a disk may have vanished
            try:
                self._take(seconds=0)
            except UserError as error:
                raise OSError(errno.EBUSY, str(error)) from None

    def release(self) -> None:
        """Let go of the lock, if it was taken, and delete it."""
        if not self.wanted:
            return
        self.wanted = False
        if self._is_mine():
            try:
                self.path.unlink()
                self.run_dir.rmdir()  # where a run has written nothing
            except OSError:
                pass
        self._close()
        heartbeat.at_exit.remove(self.release)

    def _take(self, seconds: float = SECONDS) -> None:
        """Lock the file, waiting at most so long for what a killed run has left, and sign it."""
        deadline = time.monotonic() + seconds
        while (handle := self._try_to_take(patient=time.monotonic() < deadline)) is None:
            time.sleep(0.1)
        text = json.dumps(asdict(self.me)).encode() + b"\n"
        os.pwrite(handle, text, 0)
        os.ftruncate(handle, len(text))

    def _try_to_take(self, patient: bool) -> int | None:
        """The open, locked file; None: try again. `UserError` if another run is there."""
        handle = self.handle = os.open(self.path, FLAGS, 0o644)
        try:
            free, holder = _lock(handle), _read(handle)
            if holder and (holder.host != self.me.host or (free is None and holder.is_alive())):
                raise UserError(
                    f"{self.run_dir} is written by {holder}: choose another run.name, or, if that "
                    f"run is gone, delete {self.path}"
                )
            if free is False and (not patient or (holder and holder.is_alive())):
                raise UserError(
                    f"{self.run_dir} is written by {holder or 'another process'}: wait for that "
                    "run or stop it, or choose another run.name"
                )
            if free is not False and self._is_mine():  # else deleted by a run that ended just now
                if holder:
                    print(f"{holder} has ended without a word: {self.path} is taken over")
                return handle
        except BaseException:
            self._close()
            raise
        self._close()
        return None

    def _is_mine(self) -> bool:
        """Whether the lock file is the one that this process has locked."""
        try:
            held = self.handle is not None and os.fstat(self.handle)
            return bool(held) and os.path.samestat(os.stat(self.path), held)
        except OSError:
            return False

    def _close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
        self.handle = None


def check_unlocked(run_dir: Path) -> None:
    """`UserError` if another run has the lock of a folder. Takes and writes nothing."""
    path = run_dir / LOCK
    if not path.is_file():
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return  # said when the folder is to be written
    try:
        holder, free = _read(handle), _lock(handle)
    finally:
        os.close(handle)
    elsewhere = holder is not None and holder.host != socket.gethostname()
    if free is False or elsewhere or (free is None and holder and holder.is_alive()):
        raise UserError(
            f"{run_dir} is written by {holder or 'another process'}: wait for that run or stop it, "
            f"choose another run.name, or, if that run is gone, delete {path}"
        )


def _lock(handle: int) -> bool | None:
    """Whether an open file could be locked; None if its file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise
    return True


def _read(handle: int) -> Holder | None:
    """Who has signed a lock file; None if nobody has, or a kill cut the signature."""
    try:
        return parse_record(json.loads(os.pread(handle, 4096, 0)), Holder)
    except (RecordError, ValueError, RecursionError):
        return None
