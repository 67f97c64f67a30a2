"""The starts of a run: RUN_DIR/sessions.jsonl has a line for each, and one for each rollback.

Two runs of which one was interrupted differ in this file, and in it alone.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import append_json, read_json_lines
from utils.provenance import device_name, versions

if TYPE_CHECKING:
    from accelerate import Accelerator

SESSIONS_FILE = "sessions.jsonl"


def record_start(
    run_dir: Path, accelerator: Accelerator, step: int, checkpoint: Path | None
) -> None:
    """A line of a start that goes on from `checkpoint`, after `step` steps; 0 and None: it is a new
    run. OSError if it cannot be written."""
    line = {"step": step, "time": now(), "checkpoint": checkpoint.name if checkpoint else None}
    line |= {"ranks": accelerator.num_processes, "device": device_name(accelerator.device)}
    append_json(run_dir / SESSIONS_FILE, line | {"versions": versions()})


def record_rollback(run_dir: Path, step: int) -> None:
    """A line that says that the run went back to what it was after `step` steps."""
    append_json(run_dir / SESSIONS_FILE, {"step": step, "time": now(), "event": "rollback"})


def read_sessions(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines, in the order of time; [] for a run of a version that wrote none."""
    path = run_dir / SESSIONS_FILE
    return read_json_lines(path) if path.is_file() else []


def now() -> str:
    """The time, UTC, to the second: 2026-07-01T12:00:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")
