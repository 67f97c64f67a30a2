"""Times of phases: what is inside what, what adds up, what a median is.

python -m pytest tests/utils/benchmark/test_clock.py
"""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.benchmark import clock as clocks
from utils.benchmark.clock import DATA, OTHER, PhaseClock, phase_medians, spread
from utils.training.phases import PHASES, observed, phase

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])

    def spend(ms: float) -> None:
        now[0] += ms / 1000

    return spend


def test_a_phase_does_not_count_what_another_one_inside_it_holds(seconds):
    clock = PhaseClock(CPU)
    with clock.step(), observed(clock):
        with clock.waiting_for_data():
            seconds(7)
        seconds(1)
        with phase("discriminator"):
            seconds(20)
            with phase("optimizer"):
                seconds(300)
            seconds(4000)
        seconds(2)
        with phase("optimizer"):
            seconds(50_000)
    (times,) = clock.read()
    expected = {DATA: 7, OTHER: 3, "discriminator": 4020, "optimizer": 50_300}
    assert times == pytest.approx(expected)


def test_every_step_has_times_of_its_own_and_what_is_between_them_counts_nowhere(seconds):
    clock = PhaseClock(CPU)
    for ms in (1, 2):
        with clock.step(), observed(clock), phase("sit"):
            seconds(ms)
        seconds(100)
    assert [step["sit"] for step in clock.read()] == pytest.approx([1, 2])


def test_the_phases_of_a_step_add_up_to_its_wall_time():
    clock, start = PhaseClock(CPU), time.perf_counter()
    with clock.step(), observed(clock):
        time.sleep(0.005)
        with phase("encoder"):
            time.sleep(0.01)
    (times,) = clock.read()
    assert times["encoder"] >= 10 and times[OTHER] >= 5
    assert sum(times.values()) == pytest.approx(1000 * (time.perf_counter() - start), abs=2)


STEPS = st.lists(
    st.dictionaries(st.sampled_from([DATA, OTHER, *PHASES]), st.floats(0.01, 1e4), min_size=1),
    min_size=1,
)


@given(STEPS)
def test_shares_sum_to_one_and_phases_stand_in_their_order(steps):
    found = phase_medians(steps, images=4)
    some = any(values["ms"] for values in found.values())  # a phase of few steps has median 0
    assert sum(values["share"] for values in found.values()) == pytest.approx(float(some))
    order = [DATA, *PHASES, OTHER]
    assert [order.index(name) for name in found] == sorted(order.index(name) for name in found)
    assert all(v["ms_per_image"] == pytest.approx(v["ms"] / 4) for v in found.values())


def test_one_slow_step_does_not_move_a_median():
    steps = [{"sit": 10.0, OTHER: 1.0}] * 4 + [{"sit": 900.0, OTHER: 50.0}]
    found = phase_medians(steps, images=1)
    assert found["sit"] == {"ms": 10.0, "ms_per_image": 10.0, "share": 10 / 11}


def test_a_spread_leaves_out_a_tenth_at_each_end():
    assert spread([float(value) for value in range(11)]) == {"median": 5, "low": 1, "high": 9}
    assert spread([3.0]) == {"median": 3, "low": 3, "high": 3}
