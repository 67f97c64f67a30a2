"""What the folder of a run holds, read without trust: a torn, old or foreign file is left out, with
a note on the page. Nothing is written, and no weights are read."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.checks.errors import UserError
from models.checks.file_kinds import what_is
from utils.config.load import CONFIG_FILE, read_saved_config
from utils.config.schema import Config
from utils.files import read_json_lines, read_record
from utils.report.scales import Point
from utils.sealed import CheckpointState, read_state_json
from utils.training.sessions import read_sessions

# as utils/training/tracking.py writes it, whose libraries take seconds to import
METRICS_FILE = "metrics.jsonl"
LEFT_OUT_FILE = "left_out_steps.json"
LARGEST_RECORD = 2**20  # bytes of a .json that is opened
# name of a picture's kind behind the step => its title on the page
PICTURES = {"": "Samples", "reconstructions": "Reconstructions", "latents": "Latents"}
TRAINING_ROW = "images_per_second"  # is in every line but those of evaluations


@dataclass
class Run:
    """A run as the page shows it. `name` is unique on the page."""

    path: Path
    name: str
    config: Config | None = None
    state: CheckpointState | None = None  # of the newest checkpoint
    steps_done: int = 0
    lines: int = 0  # of metrics.jsonl
    series: dict[str, list[Point]] = field(default_factory=dict)  # metric => its points
    sessions: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[tuple[int, str]] = field(default_factory=list)  # steps, and why
    pictures: dict[str, dict[int, Path]] = field(default_factory=dict)  # kind => step => file
    records: list[tuple[Path, dict]] = field(default_factory=list)  # of evaluate_fid.py
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def finished(self) -> bool:
        return self.config is not None and self.steps_done >= self.config.run.steps

    def last(self, metric: str) -> float | None:
        """The last finite value of a metric."""
        return next((v for _, v in reversed(self.series.get(metric, [])) if v is not None), None)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, each once; `UserError` for one that is no run's folder."""
    found = {folder.resolve(): folder for folder in folders}
    for folder in found.values():
        require_run(folder)
    return [read_run(folder, name) for folder, name in zip(found.values(), unique_names(found))]


def require_run(folder: Path) -> None:
    marks = (CONFIG_FILE, METRICS_FILE, "checkpoints")
    if not folder.is_dir():
        raise UserError(f"{folder} is {what_is(folder)}, expected the folder of a run: exps/NAME")
    if not any((folder / mark).exists() for mark in marks):
        raise UserError(
            f"{folder} is no folder of a run, it has none of {', '.join(marks)}: name one like "
            "exps/NAME"
        )


def unique_names(folders: Sequence[Path] | dict[Path, Path]) -> list[str]:
    """The last name of each folder, with as many of its parents as tell them apart."""
    paths = list(folders)
    names = [path.name or str(path) for path in paths]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            "/".join(path.parts[-depth:]) if names.count(name) > 1 else name
            for path, name in zip(paths, names)
        ]
    return names


def read_run(folder: Path, name: str) -> Run:
    """Everything that the page shows of one run."""
    run = Run(folder, name)
    try:
        run.config = read_saved_config(folder / CONFIG_FILE)
    except UserError as error:
        run.notes.append(f"its settings cannot be read: {error}")
    run.state = newest_state(folder)
    read_curves(run)
    done = [int(steps[-1][0]) for steps in run.series.values()]
    run.steps_done = max([0, *done, (run.state and run.state.step) or 0])
    try:
        run.sessions = read_sessions(folder)
    except OSError as error:
        run.notes.append(f"sessions.jsonl cannot be read ({error.strerror})")
    run.left_out = left_out_steps(folder / LEFT_OUT_FILE)
    run.pictures = find_pictures(folder / "samples")
    run.records = find_records(folder)
    return run


def newest_state(folder: Path) -> CheckpointState | None:
    """state.json of the newest checkpoint that has a sound one; its weights are not looked at."""
    numbered = [p for p in (folder / "checkpoints").glob("*") if re.fullmatch(r"\d{1,18}", p.name)]
    for checkpoint in sorted(numbered, key=lambda p: int(p.name), reverse=True):
        try:
            return read_state_json(checkpoint)
        except UserError:
            continue
    return None


# --------------------------------------------------------------------------------------
# Curves.


def read_curves(run: Run) -> None:
    """Fill `series` from metrics.jsonl, by steps; of two values of a step the later one counts."""
    path = run.path / METRICS_FILE
    if not path.is_file():
        run.notes.append(f"it has no {METRICS_FILE}: nothing has been logged yet")
        return
    try:
        rows = [row for row in read_json_lines(path) if finite(row.get("step")) is not None]
        torn = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) - len(rows)
    except OSError as error:
        run.notes.append(f"{METRICS_FILE} cannot be read ({error.strerror})")
        return
    if torn:
        run.notes.append(f"{torn} line(s) of {METRICS_FILE} are no whole line, and are left out")
    if not rows:
        run.notes.append(f"{METRICS_FILE} has no line yet")
    run.lines, points = len(rows), {}
    rows.sort(key=lambda row: row["step"])
    training = [row for row in rows if TRAINING_ROW in row]
    logged, steps = {name for row in training for name in row}, [row["step"] for row in training]
    for row in rows:
        for name, value in row.items():
            if name != "step" and (value is None or is_number(value)):
                points.setdefault(name, {})[row["step"]] = finite(value)
    run.series = {
        name: with_gaps(values, steps if name in logged else []) for name, values in points.items()
    }


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def finite(value: object) -> float | None:
    """A value as a float; None if it is no number, not finite, or too large for one."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if abs(number) < 1e300 else None


def with_gaps(values: dict[float, float | None], training: list[float]) -> list[Point]:
    """The points of a metric, with None at the steps of training lines that lack it between two
    that have it."""
    first, last = min(values), max(values)
    missing = [s for s in training if first < s < last and s not in values]
    return sorted((values | dict.fromkeys(missing)).items())


# --------------------------------------------------------------------------------------
# Other files.


def left_out_steps(path: Path) -> list[tuple[int, str]]:
    """Steps that rollbacks have left out, and why."""
    steps = (read_record(path) or {}).get("steps")
    steps = [each for each in steps if isinstance(each, dict)] if isinstance(steps, list) else []
    return [(s["step"], str(s.get("reason", ""))) for s in steps if type(s.get("step")) is int]


def find_pictures(folder: Path) -> dict[str, dict[int, Path]]:
    """kind => step => file; kinds in the order of `PICTURES`, others behind them."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if (match := re.fullmatch(r"(\d{1,18})(?:-(.+))?", path.stem)) and path.is_file():
            found.setdefault(match[2] or "", {})[int(match[1])] = path
    order = [kind for kind in PICTURES if kind in found]
    kinds = [*order, *(kind for kind in found if kind not in PICTURES)]
    return {kind: dict(sorted(found[kind].items())) for kind in kinds}


def find_records(folder: Path) -> list[tuple[Path, dict]]:
    """Records of evaluate_fid.py in the folder, and in folders in it but checkpoints."""
    found = []
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        if not path.is_file() or path.stat().st_size > LARGEST_RECORD:
            continue
        record = read_record(path)
        if record and {"metrics", "samples", "features", "n"} <= set(record):
            found.append((path, record))
    return found
