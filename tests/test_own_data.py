"""Anybody's images: any folder, one class, no labels. Training and sampling through the scripts.

python -m pytest tests/test_own_data.py        (CPU)
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import sample_ddp
from models.sit import SiT
from scripts import prepare_data
from tests.tiny import train, train_here
from utils import cli
from utils.training.tracking import read_metrics


def images(folder: Path, num: int, seed: int = 0) -> Path:
    """Photographs' troubles: other sizes and shapes, grey, alpha, an upper-case extension."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(num):
        height, width = rng.integers(16, 40, 2)
        shape = [(height, width, 3), (height, width), (height, width, 4)][i % 3]
        image = Image.fromarray(rng.integers(0, 256, shape, "u1"))
        image.save(folder / f"{i}.{'PNG' if i % 2 else 'png'}")
    return folder


def flat(root: Path) -> tuple[str, ...]:
    return "data.source=folder", f"data.path={images(root, 10)}"


def one_class_folder(root: Path) -> tuple[str, ...]:
    images(root / "cats", 10)
    return "data.source=folder", f"data.path={root}"


def three_classes(root: Path) -> tuple[str, ...]:
    """Of different sizes, one with subfolders and a space in its name."""
    images(root / "cats", 6)
    images(root / "dogs and wolves" / "dogs", 2)
    images(root / "dogs and wolves" / "wolves", 1)
    images(root / "10", 3)
    return "data.source=folder", f"data.path={root}", "data.num_classes=3"


def packed_flat(root: Path) -> tuple[str, ...]:
    words = [images(root / "src", 10), root / "out", "--resolution", 16, "--workers", 0]
    prepare_data.main([str(word) for word in words])
    return "data.source=packed", f"data.path={root / 'out'}"


def hdf5_without_labels(root: Path) -> tuple[str, ...]:
    """The official layout, where dataset.json has no labels."""
    paths = sorted(images(root / "src", 10).iterdir())
    with h5py.File(root / "images.h5", "w") as file:
        for path in paths:
            file[path.name] = np.frombuffer(path.read_bytes(), dtype="u1")
    (root / "images_h5.json").write_text(json.dumps([path.name for path in paths]))
    (root / "dataset.json").write_text(json.dumps({"labels": None}))
    return "data.source=hdf5", f"data.path={root}"


CASES = {flat: 1, one_class_folder: 1, three_classes: 3, packed_flat: 1, hdf5_without_labels: 1}


# as `three_classes`, without labels
LONG = (flat, one_class_folder, packed_flat, hdf5_without_labels)


@pytest.mark.parametrize(
    "make", [pytest.param(m, marks=[pytest.mark.slow] if m in LONG else []) for m in CASES]
)
def test_own_data_trains_and_samples(make: Callable, tmp_path, monkeypatch):
    """Joint training with previews, guidance and an evaluation, then images of the checkpoint."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where statistics of a reference are kept
    settings = make(tmp_path / "data")
    pictures = ("preview.every=4", "preview.num=4", "preview.steps=2", "preview.cfg_scale=2")
    numbers = ("eval.every=4", "eval.num=8", "eval.features=pixel", "eval.steps=2")
    assert train_here(tmp_path, *settings, *pictures, *numbers) == 0
    run = tmp_path / "tiny"
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["loss/sit/diffusion"] for row in rows if "loss/sit/diffusion" in row]
    assert any("eval/FD-8[pixel12]" in row for row in rows) and len(losses) == 2
    assert np.isfinite(losses).all() and (run / "samples" / "0000004.png").is_file()
    checkpoint = run / "checkpoints" / "0000004"
    sit = SiT.from_pretrained(checkpoint / "sit_ema")
    assert (sit.config.num_classes, sit.null_label) == (CASES[make], CASES[make])
    samples, labels = sample(checkpoint, tmp_path / "s.npz", monkeypatch, "--cfg-scale", "1.5")
    assert samples.shape == (6, 16, 16, 3) and samples.std() > 0
    assert sorted(set(labels)) == list(range(CASES[make]))


def sample(checkpoint: Path, out: Path, monkeypatch, *flags: str) -> tuple[np.ndarray, list[int]]:
    """Six images of `sample_ddp.py`, as many of each class, and their labels."""
    words = ["--checkpoint", checkpoint, "--out", out, "--num-samples", 6, "--class-balanced"]
    words += ["--solver", "ode-euler", "--steps", 2, "--precision", "fp32", *flags]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["sample_ddp.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.run(sample_ddp.main)
    assert not end.value.code
    with np.load(out) as file:
        return file["arr_0"], np.load(out.with_suffix(".labels.npy")).tolist()


def test_no_null_label_trains_and_samples_without_guidance(tmp_path, monkeypatch):
    settings = flat(tmp_path / "data")
    assert train_here(tmp_path, *settings, "sit.class_dropout_prob=0") == 0
    checkpoint = tmp_path / "tiny" / "checkpoints" / "0000004"
    assert SiT.from_pretrained(checkpoint / "sit_ema").null_label is None
    samples, labels = sample(checkpoint, tmp_path / "s.npz", monkeypatch)
    assert samples.shape == (6, 16, 16, 3) and set(labels) == {0}


def test_more_classes_than_the_checkpoint_knows_are_refused(tmp_path, capsys):
    """A fourth class that appears between two starts would be the null label."""
    settings = three_classes(tmp_path / "data")[:2]
    assert train_here(tmp_path, *settings, "run.steps=2") == 0
    images(tmp_path / "data" / "zebras", 3)
    capsys.readouterr()
    assert train_here(tmp_path, *settings) == 2
    error = capsys.readouterr().err
    assert "data.classes" in error


def broken(root: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    settings = flat(root)
    for name in names:
        (root / name).write_bytes(b"broken")
    return settings


@pytest.mark.slow
def test_a_run_goes_on_over_broken_images(tmp_path, capfd, monkeypatch):
    """Each is named once, also where the latents are measured, and in previews and evaluations; a
    run that goes on from the middle sees the same images."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = broken(tmp_path / "data", ("1.PNG", "4.png"))
    settings += ("latent_norm.stats_images=10",)
    settings += ("preview.every=4", "preview.num=10", "preview.steps=2")
    settings += ("eval.every=4", "eval.num=8", "eval.features=pixel", "eval.steps=2")
    assert train_here(tmp_path, *settings) == 0
    printed = capfd.readouterr().err
    assert all(printed.count(f"{name} cannot be read") == 1 for name in ("1.PNG", "4.png"))
    assert train_here(tmp_path / "b", *settings, "run.steps=2", "data.workers=1") == 0
    assert train_here(tmp_path / "b", *settings) == 0
    rows = [read_metrics(out / "tiny" / "metrics.jsonl") for out in (tmp_path, tmp_path / "b")]
    losses = [[r["loss/sit/diffusion"] for r in run if "loss/sit/diffusion" in r] for run in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("most", [0, 1])
def test_too_many_broken_images_end_a_run_after_a_save(tmp_path, capsys, most):
    settings = broken(tmp_path / "data", ("1.PNG", "4.png"))
    settings += ("latent_norm.stats_images=1", f"data.max_bad_images={most}", "run.save_every=4")
    assert train_here(tmp_path, *settings) == 2
    error = capsys.readouterr().err
    assert f"data.max_bad_images={most}" in error and "Traceback" not in error
    assert [*(tmp_path / "tiny" / "checkpoints").glob("000000[1-3]")]


@pytest.mark.slow
def test_one_rank_that_meets_too_many_broken_images_ends_both(tmp_path):
    settings = broken(tmp_path / "data", ("1.PNG", "4.png"))
    settings += ("latent_norm.stats_images=1", "data.max_bad_images=0", "run.save_every=4")
    done = train(tmp_path, *settings, "run.steps=4", ranks=2)
    assert "exitcode: 2" in done.stderr and done.stderr.count("Traceback (most") <= 1  # torchrun's
    assert done.stderr.count("more than data.max_bad_images=0") == 1
    assert [*(tmp_path / "tiny" / "checkpoints").glob("000000[1-4]")]
