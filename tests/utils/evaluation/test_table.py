"""Several sets in one table: what stands out, what is written, what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

import evaluate_fid
from models.checks.errors import UserError
from utils.evaluation.metrics import METRICS
from utils.evaluation.table import Cell, best
from utils.process.written import MARKDOWN, PICTURE, TABLE

REFERENCE = ["--reference", "real.npz", "--features", "pixel", "--cache", "none"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three sets of 60 digits: two equally good ones, and noise."""
    from utils.evaluation.images.image_sets import open_images

    monkeypatch.chdir(tmp_path)
    digits = open_images("digits:test@16").read(0, 220)
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 255, digits[:60].shape, np.uint8)
    for name, x in {
        "a": digits[:60],
        "b|c": digits[60:120],
        "noise": noise,
        "real": digits[120:],
    }.items():
        np.savez(tmp_path / f"{name}.npz", x)
    return tmp_path


def test_the_best_of_a_column_stands_out_only_beyond_the_noise():
    fid, precision = METRICS["fid"], METRICS["precision"]
    far, near = Cell(3.5, 0.05), Cell(3.1, 0.05)
    first = Cell(3.0, 0.05)
    assert best([far, first], fid) is first
    assert best([far, near, first], fid) is None
    assert best([far, first], precision) is far
    assert best([Cell(9, None), first], fid) is None
    assert best([first], fid) is None


def test_sets_stand_in_one_table_and_in_three_files(folder, capsys):
    sets = ["a.npz", "b|c.npz", "noise.npz"]
    command = [*sets, *REFERENCE, "--metrics", "fid,precision", "--table", "out/results.md"]
    evaluate_fid.main(command)
    kinds = {"md": MARKDOWN, "png": PICTURE, "json": TABLE}
    for ending, kind in kinds.items():
        assert kind.is_ours(folder / f"out/results.{ending}")
    record = json.loads((folder / "out/results.json").read_text())
    assert [row["samples"] for row in record["rows"]] == sets
    assert [each["samples"]["name"] for each in record["records"]] == sets
    for row, own in zip(record["rows"], record["records"]):
        assert row["n"] == own["n"] == 60
        assert row["not_comparable_because"] == own["not_comparable_because"]
        for name, cell in row["metrics"].items():
            assert cell["value"] == own["metrics"][name]
            assert cell["error"] == own["details"][name]["standard_error"] > 0
            assert not cell["best"]  # the two good sets differ by noise
    text = (folder / "out/results.md").read_text()
    assert text in capsys.readouterr().out.replace("\n\nwritten", "\nwritten")
    assert "b\\|c.npz" in text
    assert "**" not in text
    with Image.open(folder / "out/results.png") as picture:
        assert picture.width > 1000
    evaluate_fid.main([*command[:1], *command[2:]])  # ours may be written over
    record = json.loads((folder / "out/results.json").read_text())
    assert record["rows"][0]["metrics"]["FD[pixel12]"]["best"]
    assert "**" in (folder / "out/results.md").read_text()


def test_sets_of_different_sizes_are_ranked_in_unbiased_metrics_alone(folder):
    with np.load("noise.npz") as file:
        np.savez("half.npz", file["arr_0"][:30])
    evaluate_fid.main(["a.npz", "half.npz", *REFERENCE, "--metrics", "fid,kid", "--table"])
    first = json.loads((folder / "table.json").read_text())["rows"][0]["metrics"]
    assert not first["FD[pixel12]"]["best"]
    assert first["KD[pixel12]"]["best"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.npz", "noise.npz"], "add --table OUT"),
        (["--table", "a.npz", "noise.npz"], "expected a name for the table"),
        (["a.npz", "--table", "a"], "the samples' own record"),
        (["a.npz", "--table", "mine"], "mine.png"),
        (["a.npz", "--table", "t", "--out", "o.json"], "--out does not go with --table"),
        (["--table", "t"], "give either --samples"),
        (["./a.npz", "--samples", "a.npz", "--table", "t"], "a.npz is given twice"),
    ],
)
def test_a_table_is_refused_before_anything_is_read(folder, words, message):
    (folder / "mine.png").write_text("notes of mine\n")
    with pytest.raises(UserError, match=message):
        evaluate_fid.main([*words, *REFERENCE])
    assert (folder / "mine.png").read_text() == "notes of mine\n"


def test_all_sets_are_checked_before_the_first_is_measured(folder):
    np.savez("large.npz", np.zeros((30, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="32x32 images"):
        evaluate_fid.main(["a.npz", "large.npz", *REFERENCE, "--table", "t"])
    assert not (folder / "t.json").exists()


def test_what_has_been_measured_is_kept_when_a_later_set_fails(folder):
    (folder / "pictures").mkdir()
    with np.load("a.npz") as file:
        for i, x in enumerate(file["arr_0"]):
            Image.fromarray(x).save(folder / f"pictures/{i}.png")
    (folder / "pictures/50.png").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"50\.png"):
        evaluate_fid.main(["a.npz", "pictures", *REFERENCE, "--metrics", "fid", "--table", "t"])
    rows = json.loads((folder / "t.json").read_text())["rows"]
    assert [row["samples"] for row in rows] == ["a.npz"]
