"""Samples and their nearest training images: copies are found, mirrored or not, others are not.

python -m pytest tests/utils/pictures/test_nearest.py
"""

import numpy as np
import pytest
from PIL import Image

from models.checks.errors import UserError
from scripts import nearest_images
from tests.tiny import run_here
from utils.evaluation.images.image_sets import open_images
from utils.pictures.nearest import find_nearest


def smooth(num: int, seed: int) -> np.ndarray:
    """(num, 32, 32, 3) uint8, of a few large patches each."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, 8, 8, 3), "u1").repeat(4, 1).repeat(4, 2)


def test_copies_are_found_and_others_are_not():
    training, others = smooth(200, 0), smooth(3, 1)
    noisy = training[7] // 16 * 16
    samples = np.stack([training[5], training[6][:, ::-1], noisy, *others])
    found = find_nearest(open_images(samples), open_images(training))
    assert found.indices[:3, 0].tolist() == [5, 6, 7] and found.distances[1, 0] < 1e-3
    assert found.copies.tolist() == [True] * 3 + [False] * 3
    assert found.own.min() > 10 and "3 of 6 samples" in found.summary()


def test_the_script_shows_the_nearest_first(tmp_path, capsys):
    (known := tmp_path / "known").mkdir()
    for i, image in enumerate(training := smooth(9, 0)):
        Image.fromarray(image).save(known / f"{i}.png")
    (known / "notes.txt").touch()
    np.savez(tmp_path / "s.npz", arr_0=np.concatenate([smooth(2, 1), training[3:4]]))
    words = ["--samples", tmp_path / "s.npz", "--training", f"folder:{known}", "--num", 2]
    assert not run_here("scripts/nearest_images.py", *words, "--out", tmp_path / "out" / "n.png")
    said = capsys.readouterr().out
    assert "1 of 3 samples" in said and "s.npz, 3 images\n" in said
    assert f"folder:{known}@32, 9 images; ignored: 1 .txt" in said
    with Image.open(tmp_path / "out" / "n.png") as picture:
        assert picture.height > 2 * 96 and picture.width > 4 * 96


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(UserError, match="at the resolution of the samples"):
        find_nearest(open_images(smooth(4, 0)), open_images(smooth(9, 0)[:, :16, :16]))
    with pytest.raises(UserError, match="expected more than 3"):
        find_nearest(open_images(smooth(4, 0)), open_images(smooth(3, 0)))
    with pytest.raises(UserError, match="--out c must have a name and end in"):
        nearest_images.parse_args(["--samples", "a", "--training", "b", "--out", "c"])
