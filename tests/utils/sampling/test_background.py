"""Writing beside computing: nothing is lost, order is kept, errors end the program.

python -m pytest tests/utils/sampling/test_background.py
"""

import threading

import pytest

from models.checks.errors import UserError
from utils.sampling.background import MOST_PENDING, BackgroundWriter


def test_all_is_written_in_order_by_another_thread():
    written = []
    with BackgroundWriter(lambda *args: written.append((args, threading.get_ident()))) as writer:
        for number in range(20):
            writer.put(number, str(number))
    assert [args for args, _ in written] == [(n, str(n)) for n in range(20)]
    assert {thread for _, thread in written}.isdisjoint({threading.get_ident()})


def test_the_writer_is_never_far_behind():
    """Memory: not more blocks are kept than may be pending."""
    go, handed = threading.Event(), []

    def put_all(writer):
        for number in range(MOST_PENDING + 3):
            writer.put(number)
            handed.append(number)

    with BackgroundWriter(lambda _: go.wait(10)) as writer:
        main = threading.Thread(target=put_all, args=(writer,))
        main.start()
        main.join(0.2)
        assert handed == list(range(MOST_PENDING))
        go.set()
        main.join(10)
    assert len(handed) == MOST_PENDING + 3


def write_all(write, *given, then=None) -> None:
    with BackgroundWriter(write) as writer:
        for each in given:
            writer.put(each)
        if then:
            raise then


@pytest.mark.parametrize("number", [0, 3, 9])
def test_an_error_is_raised_and_nothing_is_written_after_it(number):
    written = []

    def write(given):
        if given == number:
            raise UserError("the disk is full")
        written.append(given)

    with pytest.raises(UserError, match="the disk is full"):
        write_all(write, *range(10))
    assert written == list(range(number))


def test_what_was_handed_over_is_written_when_the_work_is_interrupted():
    """And the interruption is what ends the program, also if writing fails as well."""
    written, slow = [], threading.Event()

    def write(given):
        slow.wait(0.1)
        written.append(given)

    def fail(given):
        slow.wait(0.1)
        raise UserError("the disk is full")

    with pytest.raises(KeyboardInterrupt):
        write_all(write, 1, 2, then=KeyboardInterrupt())
    assert written == [1, 2]
    with pytest.raises(KeyboardInterrupt):
        write_all(fail, 1, then=KeyboardInterrupt())
