"""What the tests of tables share: a record as evaluate_fid.py would write it."""

import json
from pathlib import Path

import pytest

from utils.config.load import load_config, to_yaml
from utils.evaluation.references.known import KNOWN
from utils.paper import tables

(ADM_256,) = [sha for sha, each in KNOWN.items() if each.of_adm_suite]
ROWS = tables.all_rows(tables.load_tables())


@pytest.fixture
def measured(tmp_path):
    """Write a record of a run that lies beside it, by default of the full published protocol;
    returns the folder of all records."""

    def write(name="7/init-400k", file="e.json", **changes) -> Path:
        row = ROWS[name]
        run = tmp_path / Path(row.config).name
        run.mkdir(exist_ok=True)
        if changes.pop("config", True):
            trained = load_config([tables.ROOT / row.path], changes.pop("overrides", []))
            (run / "config.yaml").write_text(to_yaml(trained))
        settings = tables.published_sampling(row).that_decide_pixels() | {"path": "linear"}
        settings |= changes.pop("settings", {})
        checkpoint = str(run / "checkpoints" / f"{row.step:07d}")
        size = [row.load().data.resolution] * 2
        record = {
            "metrics": dict(zip(tables.METRIC_NAMES, [4.11, 4.5, 160.2, 0.75, 0.61])),
            "comparable_to_papers": True,
            "not_comparable_because": [],
            "n": 50_000,
            "samples": {"size": size, "record": {"settings": settings, "checkpoint": checkpoint}},
            "reference": {"name": "ref.npz", "file_sha256": ADM_256},
            "features": {"label": "inception", "published_weights": True},
            "protocol": {"precision_recall": {"mode": "adm_fp16"}},
        }
        record["samples"] |= changes.pop("samples", {})
        (run / file).write_text(json.dumps(record | changes))
        return tmp_path

    return write
