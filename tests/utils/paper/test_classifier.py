"""The classifier: its training depends on the seed alone, and its file is a timm file.

python -m pytest tests/utils/paper/test_classifier.py
"""

import pytest
import torch
from safetensors.torch import save_file

from models.checks.errors import UserError
from utils.paper import classifier


def train(seed: int, steps: int) -> classifier.Classifier:
    x_u8, y = classifier.read_all("digits", None, 16, "train")
    net = classifier.new_classifier("test_byobnet", 16, 10, seed)
    classifier.fit(net, x_u8, y, steps=steps, batch_size=32, lr=2e-3, seed=seed)
    return net


@pytest.mark.slow
def test_it_learns_and_depends_on_the_seed_alone():
    x_u8, y = classifier.read_all("digits", None, 16, "test")
    assert train(0, 30).accuracy(x_u8, y) > 0.3
    first, again, other = train(0, 2), train(0, 2), train(1, 2)
    weights = [next(c.net.parameters()) for c in (first, again, other)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_a_file_gives_the_same_classifier_back(tmp_path):
    net = train(0, 1)
    facts = {"network": "test_byobnet", "size": 16, "seed": 0, "accuracy": 0.5}
    classifier.save(net, facts, tmp_path / "new" / "a.safetensors")
    loaded, known = classifier.load(tmp_path / "new" / "a.safetensors")
    x_u8, _ = classifier.read_all("digits", None, 16, "test")
    assert known == facts and loaded.predict(x_u8).equal(net.predict(x_u8))


def test_another_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no classifier at"):
        classifier.load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="was not made by"):
        classifier.load(tmp_path / "other.safetensors")
