"""Starts of a run: one line each, whatever a kill has left of the last one.

python -m pytest tests/utils/training/test_sessions.py
"""

from datetime import UTC, datetime
from pathlib import Path

from utils.training.sessions import SESSIONS_FILE, read_sessions, record_rollback, record_start


def test_every_start_is_a_line_also_behind_one_that_a_kill_has_cut(accelerator, tmp_path):
    assert read_sessions(tmp_path) == []
    record_start(tmp_path, accelerator, 0, None)
    with (tmp_path / SESSIONS_FILE).open("a") as file:
        file.write('{"step": 7, "ti')
    record_start(tmp_path, accelerator, 400, Path("exps/a/checkpoints/0000400"))
    record_rollback(tmp_path, 400)
    new, resumed, back = read_sessions(tmp_path)
    assert (new["step"], new["checkpoint"], new["ranks"]) == (0, None, 1)
    assert new["device"] and new["versions"]["torch"]
    assert datetime.fromisoformat(new["time"]).tzinfo == UTC
    assert (resumed["step"], resumed["checkpoint"]) == (400, "0000400")
    assert (back["step"], back["event"]) == (400, "rollback")
