"""Ranks that watch each other, all in this process: meetings, losses, where to stop."""

import queue
import threading
import time

import pytest

from utils.process import heartbeat
from utils.process.heartbeat import Heartbeat, Stopped


class Watched(Heartbeat):
    """One whose process goes on, and remembers how it would have ended."""

    def __init__(self, *args, **kwargs):
        self.said, self.code, self.signalled = [], None, False
        super().__init__(
            *args, told=lambda: self.signalled, show=lambda line: self.said.append(line), **kwargs
        )

    def _exit(self, code: int) -> None:
        self.code, self._closed = code if self.code is None else self.code, True
        if threading.current_thread() is not self._thread:
            raise SystemExit


def join(world: int, limit: float = 60) -> list[Watched]:
    letters, ranks = queue.Queue(), {}

    def exchange(text: str) -> str:
        for _ in range(world if text else 0):
            letters.put(text)
        return letters.get()

    def make(rank: int) -> None:
        ranks[rank] = Watched(rank, world, limit, f"host, pid {1000 + rank}", exchange)

    together([lambda rank=rank: make(rank) for rank in range(world)])
    return [ranks[rank] for rank in range(world)]


def together(calls: list) -> list:
    """The results of calls that threads make at the same time; an exception is a result."""
    results = [None] * len(calls)

    def call(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def wait_until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(heartbeat, "GRACE", 0.3)
    made = join(3)
    yield made
    for rank in made:
        rank.leave()


def test_what_a_rank_says_before_it_is_welcome_is_heard(monkeypatch):
    """The main process is slow to take connections; another rank already comes to a meeting."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    letters: queue.Queue[str] = queue.Queue()

    def publish(text: str) -> str:
        letters.put(text)
        time.sleep(1)
        return text

    def come(rank: int) -> str:
        exchange = (lambda _: letters.get()) if rank else publish
        watched = Watched(rank, 2, 60, "host", exchange)
        watched.meet()
        watched.leave()
        return "came"

    assert together([lambda: come(0), lambda: come(1)]) == ["came", "came"]


def test_a_meeting_waits_for_the_last_rank(ranks):
    arrived = []

    def come(rank, seconds):
        time.sleep(seconds)
        arrived.append(rank.rank)
        rank.meet()
        return len(arrived)

    assert together([lambda r=r: come(r, 0.3 * (r.rank == 1)) for r in ranks]) == [3, 3, 3]
    assert together([lambda r=r: come(r, 0.3 * (r.rank == 0)) for r in ranks]) == [6, 6, 6]


@pytest.mark.parametrize("told", [0, 2])
def test_ranks_that_are_at_different_calls_stop_at_the_same_one(ranks, told):
    def steps(rank, seconds):
        for number in range(10_000):
            if number == 20 and rank.rank == told:
                rank.signalled = True
            if rank.stop_here():
                return number
            time.sleep(seconds)

    found = together([lambda r=r: steps(r, 0.002 * (1 + r.rank)) for r in ranks])
    assert len(set(found)) == 1 and found[0] >= 20
    assert all(rank.stop_here() for rank in ranks)  # and so does every later call


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_ends_the_others_by_name(ranks, lost):
    ranks[lost]._closed = True
    ranks[lost]._thread.join()
    for peer in ranks[lost]._peers.values():  # as the system does for a dead process
        peer.socket.close()
    others = [rank for rank in ranks if rank.rank != lost]
    wait_until(lambda: all(rank.code == 1 for rank in others))
    (line,) = [line for rank in others for line in rank.said]
    assert f"rank {lost} (host, pid 100{lost})" in line


def test_a_process_that_says_nothing_ends_the_others_after_the_limit(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    first, second = join(2, limit=1.5)
    second._closed = True  # its thread stops, its connection stays
    wait_until(lambda: first.code == 1)
    assert "rank 1 (host, pid 1001) has not answered for 1.5 s" in first.said[0]
    second.leave()


def test_a_loss_waits_until_the_main_process_has_saved(ranks):
    ranks[0].busy = 1
    ranks[2].tell_failure("MemoryError", 1)
    wait_until(lambda: ranks[1].code == 1)
    assert ranks[0].code is None and ranks[0].loss.rank == 2
    ranks[0].busy = 0
    wait_until(lambda: ranks[0].code == 1)
    assert ranks[0].said == ["stopped: rank 2 (host, pid 1002) failed: MemoryError"]
    assert ranks[1].said == []


def test_a_mistake_that_all_ranks_make_is_told_by_the_first(ranks):
    """The others end with code 0, at which no launcher kills the one that is about to tell."""
    assert ranks[1].tell_failure("no such file", 2)
    wait_until(lambda: ranks[0].code == 2 and ranks[2].code == 0)
    assert ranks[0].said == ["error: no such file"] and ranks[2].said == []


def test_who_waits_for_a_rank_that_was_stopped_before_the_first_step_stops_too(ranks):
    ranks[2].tell_stopped()
    found = together([rank.meet for rank in ranks[:2]])
    assert all(isinstance(each, Stopped) for each in found)


def test_nobody_minds_a_rank_that_left(ranks):
    ranks[1].leave()
    time.sleep(0.6)
    assert all(rank.code is None and not rank.loss for rank in ranks)
