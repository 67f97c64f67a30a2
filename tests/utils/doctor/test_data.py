"""Training data: kinds, numbers, broken and small images, packed and cached sets.

python -m pytest tests/utils/doctor/test_data.py
"""

import sys

import pytest

from models.vae import build_vae
from scripts import cache_latents, prepare_data


def test_a_flat_folder_is_one_class(quick, images):
    root = images("flat", {".": 9})
    found = quick("data.source=folder", f"data.path={root}")
    (_, text), (status, caution) = found["data"]
    assert not found.failed and "9 images of 1 class" in text
    assert status == "warn" and "guidance" in caution
    assert "20 px or more" in found.only("images")[1]


def test_too_few_too_small_and_broken_images(quick, images):
    root = images("own", {"a": 3, "b": 2, "c": 1}, side=12)
    where = ("data.source=folder", f"data.path={root}")
    found = quick(*where)
    status, text = found.only("data")
    assert status == "FAIL" and "fewer than run.batch_size=8" in text
    status, text = quick(*where, "run.batch_size=2").only("images")
    assert status == "warn" and "6 of 6 sampled are smaller than 16 px (down to 12)" in text
    (root / "b" / "1.png").write_bytes(b"no image")
    status, text = quick(*where, "run.batch_size=2", "data.num_classes=3").only("images")
    assert status == "FAIL" and "1 of 6 sampled" in text and "b/1.png" in text


def test_classes_and_packed_resolution_that_are_not_the_expected_ones(quick, images, tmp_path):
    root = images("own", {"a": 5, "b": 5})
    found = quick("data.source=folder", f"data.path={root}", "data.num_classes=1000")
    assert "data.num_classes=null" in found.only("data")[1]
    words = [root, tmp_path / "packed", "--resolution", 8, "--workers", 0]
    assert not prepare_data.main([*map(str, words)])
    status, text = quick("data.source=packed", f"data.path={tmp_path / 'packed'}").only("data")
    assert status == "FAIL" and "resolution 8" in text and "16" in text
    found = quick("data.source=packed", "data.path=/no/packed")
    assert "scripts/prepare_data.py IMAGES /no/packed --resolution 16" in found.only("data")[1]


@pytest.mark.slow
def test_cached_latents_are_joined_and_no_encoder_is_needed(examined, tmp_path, monkeypatch):
    """Those of other images fail; those of these make the encoder needless, and a step smaller."""
    build_vae("tiny-f2d4").save(tmp_path / "vae")
    data = ["--data", "digits", "--resolution", 16, "--split", "test", "--workers", 0]
    words = ["--vae", tmp_path / "vae", *data, "--out", tmp_path / "c", "--encoder-grid", 4]
    words += ["--encoders", "timm:test_resnet/16", "--encoder-weights", "random"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["cache_latents.py", *map(str, words)])
        cache_latents.main()
    frozen = ["vae.train=false", f"vae.weights={tmp_path / 'vae'}"]
    frozen += [f"data.latents={tmp_path / 'c'}"]
    found = examined(*frozen)
    assert found.failed and "images without latents: 1438" in found.only("latents")[1]
    found = examined(*frozen, "data.split=test", "encoder.cached=true")
    assert not found.failed and found.only("latents")[0] == "ok" and "encoder" not in found
    assert found.only("memory")[0] == "ok"
