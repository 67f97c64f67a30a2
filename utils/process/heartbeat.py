"""The ranks of a program watch each other: one that died, hangs or failed ends the others by name.

Every rank holds one TCP connection to rank 0, and a thread of its own says every `BEAT` seconds
that the process lives; rank 0 passes news on. So a loss is noticed while the main thread waits in
a collective, which Python cannot interrupt: the thread then prints one line and ends the process.
The same connections carry `meet`, a wait without a limit, and the agreement on where to stop.
Nothing here needs torch, and messages are JSON.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

TICK = 0.25  # s between two looks at the news
BEAT = 2.0  # s between two signs of life
GRACE = 3.0  # s in which a main thread may end by itself before the thread ends the process


# what is still done when the process ends without Python's own end: letting go of locks
at_exit: list[Callable[[], object]] = []
NOTHING_TO_SAVE = "stopped before the first step: nothing new to save"


class Stopped(BaseException):
    """A signal told the program to end. No `Exception`: libraries shall not swallow it."""


@dataclass
class _Peer:
    """A connection to another rank."""

    rank: int
    socket: socket.socket
    received: bytes = b""
    silence: float = 0.0  # s since it was last heard; time in which this process slept counts less
    has_left: bool = False


@dataclass
class Loss:
    """A rank that is lost. `code` is the exit code of the program, 2 for a user's mistake, whose
    `line` the main process prints."""

    rank: int
    line: str
    code: int = 1
    since: float = field(default_factory=time.monotonic)


class Heartbeat:
    """What rank `rank` of `world` (2 or more) knows of the others, who are lost when they have not
    been heard for `limit` seconds.

    `exchange(text)` gives rank 0's text on every rank; `name` is this rank's host and pid. `told()`
    says whether this process was told to stop; `show(line)` prints a line.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        limit: float,
        name: str,
        exchange: Callable[[str], str],
        told: Callable[[], bool] = lambda: False,
        show: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ):
        self.rank, self.world, self.limit = rank, world, limit
        self.told, self.show = told, show
        self.busy = 0  # whether the main process does what must not be cut off (Ranks.on_main)
        self.loss: Loss | None = None
        self.stopped: float | None = None  # when a rank was stopped before the first step
        self._news, self._sending = threading.Condition(), threading.Lock()
        self._selector, self._closed = selectors.DefaultSelector(), False
        # meetings: how many this rank came to, the last one that all came to; on rank 0 each rank's
        self._came, self._all_came, self._meetings = 0, 0, dict.fromkeys(range(world), 0)
        # stopping: calls of `stop_here` so far; whether somebody asks; where all stop
        self._passed, self._asked, self._stop_at = 0, False, 0
        self._earliest: dict[int, int] = {}
        self._peers: dict[int, _Peer] = {}
        self.names = {rank: name}
        self._listen(exchange) if rank == 0 else self._connect(exchange)
        for peer in self._peers.values():
            self._selector.register(peer.socket, selectors.EVENT_READ, peer)
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    # ---- the connections

    def _listen(self, exchange: Callable[[str], str]) -> None:
        """Rank 0: take the connection of every other rank, then tell all of them their names."""
        ipv6 = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        token = secrets.token_hex()
        with socket.create_server(("", 0), family=family, dualstack_ipv6=ipv6) as server:
            exchange(f"{server.getsockname()[1]} {token}")
            server.settimeout(self.limit)
            while len(self._peers) < self.world - 1:
                connection, _ = server.accept()
                self._welcome(connection, token)
        for peer in self._peers.values():
            self._send(peer, names=self.names)

    def _welcome(self, connection: socket.socket, token: str) -> None:
        connection.settimeout(10)
        try:
            # unbuffered: what the rank has said after this line is for `_read`
            hello = json.loads(connection.makefile("rb", buffering=0).readline(10_000))
            rank = hello["rank"]
            known = hmac.compare_digest(hello["token"], token)
            if not known or rank not in range(1, self.world) or rank in self._peers:
                raise ValueError
            self.names[rank] = str(hello["name"])
        except (OSError, ValueError, KeyError, TypeError):  # somebody else's connection
            connection.close()
            return
        self._peers[rank] = _Peer(rank, connection)

    def _connect(self, exchange: Callable[[str], str]) -> None:
        port, token = exchange("").split()
        address = (os.environ.get("MASTER_ADDR", "localhost"), int(port))
        connection = socket.create_connection(address, timeout=min(self.limit, 60))
        connection.settimeout(10)
        self._peers[0] = _Peer(0, connection)
        self._send(self._peers[0], rank=self.rank, name=self.names[self.rank], token=token)

    def _forget(self) -> None:
        """In a forked child: let go of the connections, or the others would not see this rank
        die."""
        self._closed = True
        for peer in self._peers.values():
            peer.socket.close()

    def _send(self, peer: _Peer, **message) -> None:
        # no error: the silence of a rank, or the end of its connection, says more
        with self._sending, suppress(OSError):
            peer.socket.sendall(json.dumps(message).encode() + b"\n")

    def _tell(self, **message) -> None:
        """Send to all that this rank is connected to: to rank 0, or from it to all others."""
        for peer in [*self._peers.values()]:
            self._send(peer, **message)

    # ---- the thread

    def _watch(self) -> None:
        before, last_beat = time.monotonic(), 0.0
        while not self._closed:
            for key, _ in self._selector.select(TICK):
                self._read(key.data)
            now = time.monotonic()
            for peer in self._peers.values():
                # a process that was itself stopped for an hour does not hold it against others
                peer.silence += min(now - before, 4 * TICK)
                if peer.silence > self.limit and not peer.has_left:
                    self._lose(Loss(peer.rank, self._line(peer.rank, self._unheard())))
            before = now
            if now - last_beat > min(BEAT, self.limit / 4):
                last_beat = now
                self._tell(beat=1)
            if self.told() and not self._asked:
                self._hear(self.rank, {"ask": 1}) if self.rank == 0 else self._tell(ask=1)
            self._end_if_needed(now)

    def _unheard(self) -> str:
        return f"has not answered for {self.limit:g} s"

    def _line(self, rank: int, what: str) -> str:
        return f"rank {rank} ({self.names.get(rank, 'unknown')}) {what}"

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(65536)
        except TimeoutError:
            return
        except OSError:
            data = b""
        peer.silence = 0.0
        if not data:
            self._selector.unregister(peer.socket)
            if not peer.has_left:
                peer.has_left = True
                self._lose(Loss(peer.rank, self._line(peer.rank, "ended without a word (killed?)")))
            return
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "bye" in message:
                peer.has_left = True
            self._hear(peer.rank, message)

    def _hear(self, rank: int, message: dict) -> None:
        """News from `rank`; from rank 0, that of any rank."""
        if "names" in message:
            self.names = {int(r): name for r, name in message["names"].items()}
        if "loss" in message:
            self._lose(Loss(**message["loss"]))
        if "stopped" in message:
            for peer in self._peers.values():
                peer.has_left = True
            self._be_stopped()
        with self._news:
            self._hear_of_meetings(rank, message)
            self._hear_of_stopping(rank, message)
            self._news.notify_all()

    def _hear_of_meetings(self, rank: int, message: dict) -> None:
        if "came" in message:
            self._meetings[rank] = message["came"]
            if min(self._meetings.values()) > self._all_came:
                self._all_came = min(self._meetings.values())
                self._tell(all_came=self._all_came)
        self._all_came = message.get("all_came", self._all_came)

    def _hear_of_stopping(self, rank: int, message: dict) -> None:
        """Rank 0 asks every rank for its next call of `stop_here`; the last one counts for all. A
        rank that has answered waits in that call, so no rank can get past the one that counts."""
        if "ask" in message and not self._asked:
            self._asked = True
            if self.rank == 0:
                self._tell(ask=1)
                self._earliest[0] = self._passed + 1
            else:
                self._tell(earliest=self._passed + 1)
        if "earliest" in message:
            self._earliest[rank] = message["earliest"]
        if self.rank == 0 and len(self._earliest) == self.world and not self._stop_at:
            self._stop_at = max(self._earliest.values())
            self._tell(stop_at=self._stop_at)
        self._stop_at = message.get("stop_at", self._stop_at)

    def _lose(self, loss: Loss) -> None:
        """The first loss is the cause, all others follow from it."""
        with self._news:
            if self.loss or self._closed or self.stopped is not None:
                return
            self.loss = loss
            self._news.notify_all()
        if self.rank == 0:
            self._tell(loss={"rank": loss.rank, "line": loss.line, "code": loss.code})

    def _be_stopped(self) -> None:
        with self._news:
            if self.stopped is None:
                self.stopped = time.monotonic()
                if self.rank == 0:
                    self._tell(stopped=1)

    def _end_if_needed(self, now: float) -> None:
        """End the process if a rank is lost, or was stopped before the first step, and the main
        thread does not end it."""
        if self._closed:
            return
        if self.stopped is not None and now - self.stopped > GRACE:
            self.end()
        # the same mistake may be about to be reported by this rank itself
        if self.loss and not self.busy and (self.loss.code == 1 or now - self.loss.since > GRACE):
            self.end()

    # ---- for the main thread

    def end(self) -> None:
        """End this process because another rank was stopped or is lost: one rank of those that are
        left says why."""
        if self.loss is None:
            if self.rank == 0:
                self.show(NOTHING_TO_SAVE)
            self._exit(0)
            return
        mistake = self.loss.code == 2
        if mistake and self.rank > 0:
            # a launcher kills all at the first other code, also the one that is about to say why
            self._exit(0)
        if self.rank == min(rank for rank in range(self.world) if rank != self.loss.rank):
            self.show(f"error: {self.loss.line}" if mistake else f"stopped: {self.loss.line}")
        self._exit(self.loss.code)

    def _exit(self, code: int) -> None:
        for function in [*at_exit]:
            function()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    def meet(self) -> None:
        """Wait, however long, until every rank has called this equally often. Ends the process if
        one is lost; raises `Stopped` if one was stopped before the first step."""
        with self._news:
            self._came += 1
        if self.rank == 0:
            self._hear(0, {"came": self._came})
        else:
            self._tell(came=self._came)
        self._wait(lambda: self._all_came >= self._came)

    def _wait(self, until: Callable[[], bool]) -> None:
        with self._news:
            self._news.wait_for(lambda: until() or self.loss or self.stopped is not None)
            if until():
                return
        if self.loss and self.loss.code == 2:
            time.sleep(GRACE)  # for what this rank has to say itself
        if self.loss:
            self.end()
        raise Stopped

    def stop_here(self) -> bool:
        """Whether the program stops at this call, since a rank was told to; the same on every rank.
        Every rank makes the same calls in the same order."""
        with self._news:
            self._passed += 1
            if not self._asked:
                return False
        self._wait(lambda: self._stop_at > 0)
        return self._passed >= self._stop_at

    @property
    def asked(self) -> bool:
        """Whether any rank was told to stop, as far as is known here."""
        return self._asked

    def tell_failure(self, line: str, code: int) -> bool:
        """Tell the others that this rank ends with an error; False if the end of another rank came
        first, or comes within moments, and is the cause. `code` 2 is a user's mistake."""
        with self._news:
            if code != 2:
                self._news.wait_for(lambda: self.loss or self.stopped, timeout=GRACE)
            if self.loss or self.stopped:
                return False
            self._closed = True
        line = line if code == 2 else self._line(self.rank, f"failed: {line}")
        self._tell(loss={"rank": self.rank, "line": line, "code": code})
        return True

    def tell_stopped(self) -> None:
        """Tell the others that this rank was stopped before the first step."""
        self._be_stopped()
        self._tell(stopped=1)

    def leave(self) -> None:
        """Say goodbye; from now on nobody minds that this rank is gone."""
        self._tell(bye=1)
        self._closed = True
        self._thread.join(timeout=2 * GRACE)
        for peer in self._peers.values():
            peer.socket.close()


current: Heartbeat | None = None  # that of this process, once it has joined others
