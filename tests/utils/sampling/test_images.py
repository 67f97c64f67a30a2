"""Batches and labels; the images themselves are tested through sample_ddp.py.

python -m pytest tests/utils/sampling/test_images.py
"""

import pytest
import torch

from utils.sampling.images import draw_labels, split_evenly
from utils.sampling.settings import SamplingSettings


@pytest.mark.parametrize(("num", "most"), [(100, 64), (100, 100), (7, 100), (101, 10), (5, 1)])
def test_batches_are_even_and_cover_everything_in_order(num, most):
    parts = split_evenly(range(300, 300 + num), most)
    assert [i for part in parts for i in part] == list(range(300, 300 + num))
    sizes = {len(part) for part in parts}
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert len(parts) == -(-num // most)  # no call more than needed


def test_random_labels_depend_on_seed_and_index_alone():
    def draw(seed, rows):
        return draw_labels(SamplingSettings(seed=seed), rows, 1000)

    y = draw(0, range(4000))
    assert torch.equal(torch.cat([draw(0, range(i, i + 100)) for i in range(0, 4000, 100)]), y)
    assert (y == draw(1, range(4000))).float().mean() < 0.01
    assert y.min() >= 0 and y.max() < 1000 and len(set(y.tolist())) > 950
    assert float(y.float().mean()) == pytest.approx(499.5, abs=20)
