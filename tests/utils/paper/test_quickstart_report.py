"""The report at the end of the quickstart, of a planted run.

python -m pytest tests/utils/paper/test_quickstart_report.py
"""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import run_here
from utils.paper import classifier
from utils.paper.quickstart_report import (
    CURVES,
    ENLARGED,
    REAL,
    count_pairs,
    draw_digits,
    frequent_confusions,
    matching_names,
    off_diagonal,
    report,
    rounded,
    summary_text,
)
from utils.pictures.grid import MARGIN


@pytest.fixture
def run(tmp_path):
    """A finished run: an untrained judge, twenty black images, two log lines, an evaluation."""
    (tmp_path / "samples").mkdir()
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((20, 16, 16, 3), "u1"))
    np.save(tmp_path / "samples.labels.npy", np.arange(20) % 10)
    judge = classifier.new_classifier("test_byobnet", 16, 10, 0)
    facts = {"network": "test_byobnet", "size": 16, "seed": 0, "accuracy": 0.5}
    classifier.save(judge, facts, tmp_path / "judge.safetensors")
    rows = [{"step": s, "images_per_second": 10.0 * s, "loss/disc/other": 1.0} for s in (1, 3)]
    (tmp_path / "config.yaml").write_text("run: {name: planted}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "0000003-reconstructions.png")
    (tmp_path / "started").write_text(f"{int(time.time()) - 60}\n")
    (tmp_path / "evaluation.json").write_text(json.dumps({"metrics": {"FD": 1.5}}))
    return tmp_path


def test_the_report_is_pictures_and_figures(run):
    summary = report(run)
    assert json.loads((run / "summary.json").read_text()) == summary
    assert 0 <= summary["label_accuracy"] <= 1 and summary["classifier_accuracy"] == 0.5
    assert (summary["steps"], summary["images_per_second"]) == (3, 20.0)
    assert summary["evaluation"] == {"FD": 1.5} and 60 <= summary["seconds"] < 300
    meant = [sum(row) for row in summary["confusion_matrix"]]
    assert meant == [2] * 10 and summary["errors"] == 20 - 20 * summary["label_accuracy"]
    pictures = ("digits.png", "confusion.png", "curves.png", "reconstructions.png")
    assert all(Image.open(run / name).width for name in pictures)
    assert "3 steps" in summary_text(run, summary)


def test_the_script_prints_the_summary_and_writes_the_page(run, capsys):
    assert run_here("scripts/quickstart_report.py", "--run", run) == 0
    assert "of 20 generated digits" in capsys.readouterr().out
    assert "<html" in (run / "report.html").read_text()


def test_rows_and_columns_of_the_digits_are_named(run):
    """Named by text at the left and above: without it the picture would be panels and margins."""
    x_u8, y = torch.zeros(20, 3, 16, 16, dtype=torch.uint8), torch.arange(20) % 10
    draw_digits(x_u8, y, run / "digits.png")
    picture = np.asarray(Image.open(run / "digits.png").convert("L"))
    cells = (REAL + 1 + 2) * (ENLARGED + 3)
    assert picture.shape[1] > cells + 2 * MARGIN and (picture[:, :20] < 128).any()
    assert (picture[: MARGIN + 12] < 128).any()


def test_confusions_are_counted_and_the_most_frequent_come_first():
    meant, read = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 2, 2, 1, 0])
    confusion = count_pairs(meant, read)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 2], [1, 0, 0]]
    assert off_diagonal(confusion) == [(1, 2), (0, 1), (2, 0)]
    assert frequent_confusions(confusion)[0] == {"meant": 1, "read_as": 2, "images": 2}
    assert off_diagonal(count_pairs(meant, meant)) == []


def test_the_figures_of_the_summary_have_four_digits():
    found = rounded({"a": [0.123456, 7], "b": {"c": 12345.6}})
    assert found == {"a": [0.1235, 7], "b": {"c": 12350}}


def test_the_discriminators_loss_may_have_any_name():
    rows = [{"step": 1, "loss/disc/other": 1.0}, {"step": 2, "loss/disc/lecam": 1.0}]
    names = matching_names(rows, CURVES["discriminator"])
    assert names == ["loss/disc/other", "loss/disc/lecam"]
