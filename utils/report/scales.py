"""Axes of a chart: what range they show, where their ticks are, and which points are drawn.

A point is (step, value); the value None is one that was not finite, or a gap.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Point = tuple[float, float | None]

OUTLIER = 3  # times the span of the middle 96 %: what lies further out does not set the range
MIDDLE = (0.02, 0.98)
FEW = 50  # with fewer values nothing is an outlier
LOG_RATIO = 40  # largest by smallest positive value from which on the axis is logarithmic
FROM_ZERO = 0.35  # of the range: values this near to 0 have 0 on their axis
TINY = 1e-200  # smaller sizes are drawn as 0: their logarithms and ratios overflow
BUCKETS = 220  # each keeps its first, smallest, largest and last point
SMOOTH_FROM = 40  # points, below which nothing is smoothed
SMOOTH_SHARE = 0.04  # of all points are averaged into one


class Axis(NamedTuple):
    """A vertical axis from `low` to `high`; `outside`: how many values lie beyond it."""

    low: float
    high: float
    log: bool = False
    outside: int = 0

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the bottom, 1 at the top; beyond that outside."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        if value <= 0:
            return -1.0
        return math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def fit_axis(values: Sequence[float]) -> Axis:
    """The axis for finite values: robust to outliers, logarithmic if they span decades."""
    ordered = sorted(v if abs(v) >= TINY else 0.0 for v in values)
    if not ordered:
        return Axis(0.0, 1.0)
    log = ordered[0] > 0 and ordered[-1] / ordered[0] > LOG_RATIO
    scaled = [math.log10(v) for v in ordered] if log else ordered
    low, high = _robust(scaled)
    outside = sum(not low <= v <= high for v in scaled)
    # a value that lies outside no longer asks for a logarithm
    if log and high - low < math.log10(LOG_RATIO) and outside:
        log, (low, high) = False, _robust(ordered)
        outside = sum(not low <= v <= high for v in ordered)
    if low == high:  # a constant is shown with its distance from 0
        low, high = (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)
    room = 0.05 * (high - low)
    low, high = low - room, high + room
    if log:
        return Axis(10**low, 10**high, True, outside)
    if ordered[0] >= 0 and low + room <= FROM_ZERO * high:
        low = 0.0
    return Axis(low, high, False, outside)


def _robust(ordered: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value to show."""
    if len(ordered) < FEW:
        return ordered[0], ordered[-1]
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in MIDDLE)
    reach = OUTLIER * (high - low) or abs(high) or 1.0
    inside = [v for v in ordered if low - reach <= v <= high + reach]
    return inside[0], inside[-1]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in a range, at most `most`."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    unit = 10 ** math.floor(math.log10(span / most))
    step = next((unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= most), unit * 10)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten in a range, a few of them if there are many; 2 and 5 between them if few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / most))
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**e for e in range(first, last + 1, every) for m in mantissas]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most + 1:
            return found
    return found


def labels(values: Sequence[float]) -> list[str]:
    """The ticks in as few signs as tell them apart."""
    written = [short(value) for value in values]
    for digits in range(5, 16):
        if len(set(written)) == len(set(values)):
            break
        written = [short(value, digits) for value in values]
    return written


def short(value: float, digits: int = 4) -> str:
    """A tick in few signs: 0, 0.05, 12k, 1.5M, 1e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= size < 1e15 and (size >= 1e4 or unit > 1e3):
            return f"{value / unit:.{digits}g}{letter}"
    text = f"{value:.{digits if 1e-3 <= size < 1e15 else digits - 2}g}"
    head, e, exponent = text.partition("e")
    return f"{head}e{int(exponent)}" if e else text


def thin(points: Sequence[Point]) -> list[Point]:
    """At most some `4 * BUCKETS` of the points: of each stretch the first, smallest, largest and
    last one, and every gap. What an eye would see in all of them, it sees in these."""
    if len(points) <= 4 * BUCKETS:
        return list(points)
    first, last = points[0][0], points[-1][0]
    width = (last - first) / BUCKETS or 1.0
    buckets: dict[int, list[Point]] = {}
    for point in points:
        buckets.setdefault(min(BUCKETS - 1, int((point[0] - first) / width)), []).append(point)
    kept: list[Point] = []
    for bucket in buckets.values():
        kept += _extremes(bucket)
    return kept


def _extremes(bucket: list[Point]) -> list[Point]:
    finite = [(v, i) for i, (_, v) in enumerate(bucket) if v is not None]
    gaps = [i for i, (_, v) in enumerate(bucket) if v is None]
    chosen = {0, len(bucket) - 1, *gaps[:1]}
    if finite:
        chosen |= {min(finite)[1], max(finite)[1]}
    return [bucket[i] for i in sorted(chosen)]


def smoothed(points: Sequence[Point], log: bool = False) -> tuple[list[Point], int]:
    """The mean of each point and its neighbours on both sides, and how many these are together;
    nothing if there are few points. Gaps stay, and are not averaged over. `log`: the mean of the
    logarithms, for a logarithmic axis, whose values are above 0."""
    if len(points) < SMOOTH_FROM:
        return [], 0
    half = max(2, round(len(points) * SMOOTH_SHARE / 2))
    result: list[Point] = []
    for part in split(points):
        sums = [0.0]
        for _, value in part:
            sums.append(sums[-1] + (math.log(value) if log else value))
        for i, (step, _) in enumerate(part):
            near = min(half, i, len(part) - 1 - i)  # as far on one side as on the other
            mean = (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)
            result.append((step, math.exp(mean) if log else mean))
        result.append((part[-1][0], None))
    return thin(result), 2 * half + 1


def split(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The stretches between gaps."""
    parts: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None:
            parts.append([])
        else:
            parts[-1].append((step, value))
    return [part for part in parts if part]
