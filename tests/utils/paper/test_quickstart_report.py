"""The report at the end of the quickstart, of a planted run.

python -m pytest tests/utils/paper/test_quickstart_report.py
"""

import json
import time

import numpy as np
import pytest
from PIL import Image

from utils.paper import classifier
from utils.paper.quickstart_report import CURVES, matching_names, report, summary_text


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
    pictures = ("digits.png", "curves.png", "reconstructions.png")
    assert all(Image.open(run / name).width for name in pictures)
    assert "3 steps" in summary_text(run, summary)


def test_the_discriminators_loss_may_have_any_name():
    rows = [{"step": 1, "loss/disc/other": 1.0}, {"step": 2, "loss/disc/lecam": 1.0}]
    names = matching_names(rows, CURVES["discriminator"])
    assert names == ["loss/disc/other", "loss/disc/lecam"]
