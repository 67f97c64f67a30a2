"""The picture of rows of images: every pixel of a panel is there, and every title.

python -m pytest tests/utils/pictures/test_grid.py
"""

import numpy as np
import pytest
import torch
from PIL import Image

from utils.pictures.grid import Row, join_panels, name_of, save_grid_of_rows


def rows() -> list[Row]:
    return [
        Row("a", [], torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
        Row("a-name-that-takes-several-lines", ["x"], torch.full((1, 3, 16, 16), 200).byte()),
    ]


def test_panels_of_several_sizes_are_enlarged_to_one():
    pixels = join_panels(rows())
    assert pixels.shape == (2 * 99, 2 * 99, 3)  # cells of 96 = 6 x 16 pixels and a gap of 3
    cells = pixels.reshape(2, 99, 2, 99, 3).swapaxes(1, 2)
    assert (cells[:, :, 96:] == 255).all() and (cells[:, :, :, 96:] == 255).all()
    panels = cells[:, :, :96, :96]
    assert (panels[0] == 0).all() and (panels[1, 0] == 200).all() and (panels[1, 1] == 255).all()
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(1, 3, 4, 4)
    large = join_panels([Row("", [], image)])[:96, :96]
    assert np.array_equal(large, image[0].permute(1, 2, 0).numpy().repeat(24, 0).repeat(24, 1))


def test_the_file_holds_the_panels_pixel_by_pixel_and_every_title(tmp_path):
    save_grid_of_rows(tmp_path / "new" / "a.png", rows(), ["one", "two"])
    picture = np.asarray(Image.open(tmp_path / "new" / "a.png").convert("RGB"))
    pixels = join_panels(rows())
    height, width = pixels.shape[:2]
    found = [
        (top, left)
        for top in range(picture.shape[0] - height)
        for left in range(picture.shape[1] - width)
        if np.array_equal(picture[top : top + height, left : left + width], pixels)
    ]
    top, left = found[0]
    titles, headings = picture[top : top + height, :left], picture[:top, left : left + width]
    for half in (titles[:99], titles[99:], headings[:, :99], headings[:, 99:]):
        assert half.min() < 50  # there is a text
    for edge in (picture[:5], picture[-5:], picture[:, :5], picture[:, -5:]):
        assert (edge == 255).all()  # and none is cut off


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("exps/x/checkpoints/0400000", ["x", "0400000"]),
        ("exps/x/checkpoints/0400000/vae", ["x", "0400000"]),
        ("somewhere/my-vae", ["my-vae"]),
    ],
)
def test_names_of_folders(path, name, tmp_path):
    assert name_of(tmp_path / path) == name
