"""Fixtures of several test files."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import HealthCheck, settings

from utils.cost.fake_cuda import too_old

# Properties are tried on the same few examples in every run, and nothing is written beside them.
settings.register_profile(
    "repeatable", derandomize=True, max_examples=20, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("repeatable")

# The files that take longest start first, so that neither core waits for the other at the end
# (scripts/test.sh keeps this order when it shares files between two processes).
LONGEST = (
    *("test_resume.py", "test_ddp.py", "test_plan.py", "test_nonfinite.py", "test_sources.py"),
    *("test_latent_norm.py", "test_sample_ddp.py", "test_train.py", "test_own_data.py"),
)


# What counts without a GPU, which old versions of torch cannot.
COUNTING = ("utils/cost/", "doctor/test_memory.py", "test_settings_that_fit.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if reason := too_old():
        for item in items:
            if any(part in item.path.as_posix() for part in COUNTING):
                item.add_marker(pytest.mark.skip(reason=reason))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """What is kept for later runs is not kept in the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPA_E_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def accelerator():
    """A CPU one; its state is kept in singletons, which no other test shall see."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def native_halves(monkeypatch):
    """Compute in bf16 and fp16 where they are asked for, on a CPU without them, too."""
    monkeypatch.setattr("utils.precision.cpu_has", lambda precision: True)


@pytest.fixture
def one_thread():
    """As in the processes of scripts that tests start: sums of several threads round apart."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_is_left(monkeypatch, tmp_path):
    """Kill every process that a test has started, ranks and workers included: they inherit a mark
    in their environment."""
    mark = f"REPA_E_TEST={tmp_path}"
    monkeypatch.setenv(*mark.split("=", 1))
    yield
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)
