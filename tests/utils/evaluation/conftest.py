"""Fixtures of the tests of evaluation."""

import pytest

from tests.random_inception import save_random_inception


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A weight file of Inception, random but with features that differ between images."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    save_random_inception(path)
    return path
