"""Two results of scripts/benchmark.py beside each other. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from models.checks.errors import UserError
from models.checks.file_kinds import read_json
from utils.records import Range, RecordError, number, parse_record

FORMAT = "repae-benchmark-1"  # utils/process/written.py knows results by it
REMEDY = "give two files that scripts/benchmark.py --json has written"
# rows of the table: what each is called, and where it stands in a result
ROWS = {
    "images/s a rank": ("images_per_second",),
    "images/s a rank, fused": ("images_per_second_fused",),
    "images/s of all ranks": ("images_per_second_all_ranks",),
    "step, ms": ("step_ms", "median"),
    "batch, ms": ("batch_ms", "median"),
    "peak memory, GiB": ("peak_memory_gib",),
    "GFLOP an image": ("gflop_per_image",),
    "TFLOP/s a rank": ("achieved_tflops",),
    "share of matmul peak": ("share_of_matmul_peak",),
    "kernels a step": ("kernels_per_step",),
    "host syncs a step": ("host_syncs_per_step",),
    "processor s an image": ("processor_seconds_per_image",),
}


@dataclass
class Result:
    """What a file must hold to be compared. A prediction is one of training."""

    format: Literal["repae-benchmark-1"]
    mode: Literal["training", "prediction", "sampling", "data"]
    images_per_second: float = number(above=0)
    device: str = ""
    ranks: int = number(1, at_least=1)
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    def kind(self) -> str:
        return "training" if self.mode == "prediction" else self.mode


def read_result(path: Path) -> tuple[Result, dict[str, Any]]:
    """A result, and all that its file holds; `UserError` for a file that is none."""
    content = read_json(path, REMEDY)
    try:
        return parse_record(content, Result), content
    except RecordError as error:
        raise UserError(f"{path} is no result of a benchmark ({error}); {REMEDY}") from None


def compare(a: Path, b: Path) -> str:
    """The table, with the settings in which the two differ; `UserError` for two results of
    different kinds."""
    (one, first), (other, second) = read_result(a), read_result(b)
    if one.kind() != other.kind():
        raise UserError(f"{a} is of {one.mode}, {b} of {other.mode}: compare results of one kind")
    lines = [f"A  {title(one)}  {a}", f"B  {title(other)}  {b}"]
    lines += [f"   {line}" for line in differences(one, other)]
    lines.append(f"\n{'':<36}{'A':>10}{'B':>10}{'B / A':>9}")
    lines += [row(*values) for values in rows(first, second)]
    return "\n".join(lines)


def title(result: Result) -> str:
    ranks = f", {result.ranks} ranks" if result.ranks > 1 else ""
    return f"{result.mode} on {result.device or 'an unnamed device'}{ranks}"


def differences(one: Result, other: Result) -> Iterator[str]:
    """Settings and versions that are not the same, a line each."""
    for name in ("settings", "sampling", "versions"):
        old, new = getattr(one, name), getattr(other, name)
        for key in dict.fromkeys((*old, *new)):
            if old and new and old.get(key) != new.get(key):
                yield f"{key}: {old.get(key)} -> {new.get(key)}"


def rows(first: dict, second: dict) -> Iterator[tuple[str, float | None, float | None]]:
    """(name, value in A, value in B) of every figure that at least one of the two has."""
    places = dict(ROWS)
    phases = [content.get("phases", {}) for content in (first, second)]
    for phase in dict.fromkeys((*phases[0], *phases[1])):
        places[f"{phase}, ms an image"] = ("phases", phase, "ms_per_image")
    for name, place in places.items():
        values = at(first, place), at(second, place)
        if values != (None, None):
            yield name, *values


def at(content: Any, place: tuple[str, ...]) -> float | None:
    """The number at a place of a result; None if there is none."""
    for key in place:
        content = content.get(key) if isinstance(content, dict) else None
    return float(content) if content in Range() and not isinstance(content, bool) else None


def row(name: str, a: float | None, b: float | None) -> str:
    ratio = f"{b / a:8.3f}x" if a and b is not None else f"{'':>9}"
    return f"{name:<36}{shown(a):>10}{shown(b):>10}{ratio}"


def shown(value: float | None) -> str:
    """Four digits of a number; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
