"""Pictures during training: every image with the name of its class, latents as colours, and which
of them a run already has.

python -m pytest tests/utils/pictures/test_preview.py
"""

import numpy as np
import pytest
import torch

from utils.pictures.grid import draw_rows, font_of, shortened
from utils.pictures.preview import (
    draw_latents,
    draw_pairs,
    draw_samples,
    is_drawn,
    later_pictures,
    picture_files,
)


def images(num: int, side: int = 16) -> torch.Tensor:
    """(N, 3, H, W), each of one colour of its own, none of them white or black."""
    colours = torch.arange(num) * 200 // num + 20
    return colours.to(torch.uint8).view(num, 1, 1, 1).repeat(1, 3, side, side)


def places(picture, x_u8: torch.Tensor) -> list[tuple[int, int]]:
    """(top, left) of each of `images`, enlarged to 96 px."""
    pixels, found = np.asarray(picture)[..., 0], []
    for level in x_u8[:, 0, 0, 0].tolist():
        mask = pixels == level
        top = int((mask.sum(1) >= 96).argmax())
        left = int(mask[top].argmax())
        assert mask[top : top + 96, left : left + 96].all()
        found.append((top, left))
    return found


@pytest.mark.parametrize("num_classes", [1, 2, 3, 10, 11, 1000])
def test_every_sample_is_there_in_order_whatever_the_number_of_classes(num_classes):
    names = [f"class-{i}" for i in range(num_classes)]
    x_u8 = images(20)
    found = places(draw_samples(x_u8, names), x_u8)
    assert found == sorted(found) and len(set(found)) == 20


def test_names_stand_above_columns_if_there_are_few_and_above_each_image_otherwise(monkeypatch):
    drawn = []

    def draw(rows, headings=()):
        drawn.append((headings, [[*row.captions] for row in rows], [len(r.panels) for r in rows]))
        return draw_rows(rows, headings)

    monkeypatch.setattr("utils.pictures.preview.draw_rows", draw)
    draw_samples(images(9), ["cat", "dog"])
    draw_samples(images(5), ["n02099601"] + [f"name {i}" for i in range(999)])
    draw_samples(images(3), ["cat"])
    few, many, one = drawn
    assert few == (["cat", "dog"] * 4 + ["cat"], [[]], [9])
    assert many == ((), [["golden retriever", "name 0", "name 1", "name 2", "name 3"]], [5])
    assert one == ((), [[]], [3])


def test_a_name_is_cut_where_the_image_ends_and_is_never_wider():
    font = font_of(13)
    assert shortened("cat", font, 96) == "cat"
    cut = shortened("a very long name\nof a class", font, 96)
    assert cut.endswith("…") and cut.startswith("a very") and font.getlength(cut) <= 96
    assert shortened("cat", font, 2) == "…"
    few = draw_samples(images(4), ["cat", "W" * 300])
    assert few.size == draw_samples(images(4), ["cat", "dog"]).size


def test_pairs_of_rows_are_named(monkeypatch):
    titles = []
    draw = "utils.pictures.preview.draw_rows"
    monkeypatch.setattr(draw, lambda rows: titles.extend((r.title, len(r.panels)) for r in rows))
    draw_pairs(("real", images(16)), ("reconstructed", images(16)))
    assert titles == [("real", 8), ("reconstructed", 8)] * 2


@pytest.mark.parametrize("channels", [1, 4, 32])
def test_latents_are_drawn_also_where_they_are_constant_or_not_finite(channels):
    z = torch.randn(16, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = draw_latents(images(16), z)
    assert whole.tobytes() == draw_latents(images(16), z.clone()).tobytes()
    broken = z.clone()
    broken[3] = float("nan")
    broken[4, 0, 0, 0] = float("inf")
    for some in (broken, torch.zeros_like(z), z * 1e30):
        assert draw_latents(images(16), some).size == whole.size


def test_small_images_are_enlarged_and_large_ones_kept_as_they_are():
    for side, cell in ((8, 96), (16, 96), (64, 128), (256, 256)):
        picture = draw_samples(images(8, side), ["cat", "dog"])
        assert 8 * cell < picture.size[0] < 8.6 * cell + 30


def test_later_pictures_are_those_of_picture_files_and_no_others(tmp_path):
    for step in (5, 10, 15):
        for path in picture_files(tmp_path, step).values():
            path.parent.mkdir(exist_ok=True)
            path.touch()
    others = ["mine.png", "0000015-mine.png", "15.png", "0000015.jpg"]
    for name in others:
        (tmp_path / "samples" / name).touch()
    assert sorted(later_pictures(tmp_path, 10)) == sorted(picture_files(tmp_path, 15).values())
    assert not later_pictures(tmp_path, 15) and not later_pictures(tmp_path / "absent", 0)


def test_pictures_of_an_older_version_count_and_a_cut_off_preview_does_not(tmp_path):
    """That wrote samples, then reconstructions, and no latents."""
    *first, last = picture_files(tmp_path, 5).values()
    last.parent.mkdir()
    for path in first:
        path.touch()
        assert not is_drawn(tmp_path, 5)
    last.touch()
    assert is_drawn(tmp_path, 5)
    picture_files(tmp_path, 5)["latents"].unlink()
    assert is_drawn(tmp_path, 5)
