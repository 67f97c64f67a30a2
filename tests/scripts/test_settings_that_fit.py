"""scripts/settings_that_fit.py: rows of a table, for GPUs that are not here."""

import sys

import pytest

from scripts import settings_that_fit
from tests.tiny import ROOT


@pytest.mark.slow
def test_a_row_has_settings_memory_speed_and_days(capsys, monkeypatch):
    config = str(ROOT / "configs" / "quickstart.yaml")
    words = ["--config", config, "--devices", "rtx4090", "--processes", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["settings_that_fit.py", *words])
    settings_that_fit.main()
    head, rule, *rows = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len(rows) == 2 and head.count("|") == rule.count("|") == rows[0].count("|")
    assert [c[1].split(" x ")[0] for c in cells] == ["1", "2"]
    for _, _, settings, memory, eager, compiled, days in cells:
        assert settings == "run.checkpointing=none run.accumulation=1"
        assert 3 < float(memory) < 10 and float(eager.replace(",", "")) > 0
        assert float(eager.replace(",", "")) <= float(compiled.replace(",", "")) and float(days) > 0
