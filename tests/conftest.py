"""Fixtures of several test files."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

# The files that take longest start first, so that neither core waits for the other at the end
# (scripts/test.sh keeps this order when it shares files between two processes).
LONGEST = ("test_ddp.py", "test_resume.py", "test_cost.py", "test_sample_ddp.py", "test_readme.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def accelerator():
    """A CPU one; its state is kept in singletons, which no other test shall see."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def one_thread():
    """As in the processes of scripts that tests start: sums of several threads round apart."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
