"""Crop, conversions and picture grids."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from models.checks.errors import UserError
from utils.data.decoding.conversion import PLAIN
from utils.data.images import (
    UnreadableImageError,
    center_crop,
    pm1_to_01,
    pm1_to_u8,
    read_image,
    u8_to_pm1,
)

SIZES = [(64, 64), (65, 63), (127, 301), (301, 127), (128, 128), (129, 500), (31, 40), (3, 5)]
SIZES += [(640, 33), (33, 640), (1, 1), (257, 255)]


def adm_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The published formula, written out on its own: shrink, resize, cut the array."""
    image = Image.fromarray(pixels)
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    factor = size / min(width, height)
    new_size = round(width * factor), round(height * factor)
    array = np.array(image.resize(new_size, resample=Image.BICUBIC))
    top = (array.shape[0] - size) // 2
    left = (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), "u1")


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_center_crop_is_adms_bit_for_bit(width, height, size):
    pixels = noise(width, height)
    ours = np.asarray(center_crop(Image.fromarray(pixels), size))
    assert ours.shape == (size, size, 3)
    assert np.array_equal(ours, adm_crop(pixels, size))


@pytest.mark.parametrize("size", [64, 256, 400, 512])
def test_center_crop_of_photographs(size):
    for photo in load_sample_images().images:
        for pixels in (photo, photo.transpose(1, 0, 2).copy()):
            ours = np.asarray(center_crop(Image.fromarray(pixels), size))
            assert np.array_equal(ours, adm_crop(pixels, size))


def test_u8_round_trip_and_range():
    x_u8 = torch.arange(256, dtype=torch.uint8)
    x_pm1 = u8_to_pm1(x_u8)
    assert x_pm1.dtype == torch.float32 and x_pm1.min() == -1 and x_pm1.max() == 1
    assert torch.equal(pm1_to_u8(x_pm1), x_u8)
    assert pm1_to_01(x_pm1).min() == 0 and pm1_to_01(x_pm1).max() == 1


@pytest.mark.parametrize("rule", ["round", "truncate"])
def test_to_u8_clamps_also_in_bf16(rule):
    x = torch.tensor([-9.0, -1.0, 1.0, 9.0], dtype=torch.bfloat16)
    assert pm1_to_u8(x, rule).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(("rule", "shift"), [("round", 0.0), ("truncate", -0.5)])
def test_mean_shift_of_the_rounding_rules(rule, shift):
    x = torch.linspace(-1, 1, 1_000_001)
    grey = (x.double() + 1) * 127.5
    assert (pm1_to_u8(x, rule).double() - grey).mean().item() == pytest.approx(shift, abs=0.005)


def test_truncate_is_the_formula_of_the_published_samples():
    x = torch.rand(100_000) * 2.2 - 1.1
    published = torch.clamp(255.0 * ((x + 1) / 2), 0, 255).to(torch.uint8)
    assert torch.equal(pm1_to_u8(x, "truncate"), published)


def test_unknown_rounding_rule():
    with pytest.raises(AssertionError):
        pm1_to_u8(torch.zeros(1), "ceil")


def saved(image: Image.Image, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file


def test_bad_bytes_are_told_from_a_failing_disk(tmp_path):
    with pytest.raises(UnreadableImageError, match="cannot decode it: not an image") as caught:
        read_image(io.BytesIO(b"text"), "it", 8, PLAIN)
    assert caught.value.reason == "not an image, but a text file"
    whole = saved(Image.fromarray(noise(99, 99))).getvalue()
    with pytest.raises(UnreadableImageError, match="cannot decode it") as caught:
        read_image(io.BytesIO(whole[: len(whole) // 2]), "it", 8, PLAIN)
    assert "0x" not in caught.value.reason  # no memory address: the same text in every run
    with pytest.raises(UserError, match="cannot read it: No such file") as caught:
        read_image(tmp_path / "none.png", "it", 8, PLAIN)
    assert not isinstance(caught.value, UnreadableImageError)
