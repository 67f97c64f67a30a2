"""One chart of one metric over steps, as SVG: every run a line with its own colour, dash and mark.

A chart has the width of a phone's screen at its own size, so that its letters are never small.
Positions are in pixels of a plot that is WIDTH x HEIGHT inside the margins.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

from utils.report.catalog import Kind
from utils.report.events import Event
from utils.report.markup import Html, escape, figure, join, tag
from utils.report.scales import Axis, Point, fit_axis, labels, short, smoothed, split, thin, ticks

WIDTH, HEIGHT = 334, 150
LEFT, TOP, RIGHT, BOTTOM = 52, 20, 14, 34
MARKED = 30  # points, up to which each has a mark of its own
STYLES = 8  # runs with a style of their own; then they repeat
MOST_EVENTS = 40  # in the list
EDGE = 5  # pixels for marks on the sides of the plot, which cuts off what lies outside
BESIDE = 13  # pixels between the letters of two events, at least
FAR = 3.0  # heights of the plot beyond which a line is not drawn further
# outlines of marks around (0, 0)
MARKS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "M-2.8-2.8h5.6v5.6h-5.6z",
    "M0-3.6L3.4 2.6H-3.4z",
    "M0-3.8L3.8 0L0 3.8L-3.8 0z",
)


class Line(NamedTuple):
    """One run in a chart: `style` is its number on the page, from 0; a single run has no name."""

    name: str
    style: int
    points: list[Point]


class Steps(NamedTuple):
    """The horizontal axis, the same in all charts of a page."""

    first: float
    last: float

    def x(self, step: float) -> float:
        return WIDTH * (step - self.first) / ((self.last - self.first) or 1)


def chart(
    kind: Kind, name: str, lines: Sequence[Line], events: Sequence[Event], steps: Steps
) -> Html:
    """The metric `name`: title, what it says, the plot, the last values, and notes."""
    values = [v for line in lines for _, v in line.points if v is not None]
    axis = fit_axis(values)
    drawn = [line._replace(points=thin(line.points)) for line in lines]
    means = [smoothed(line.points, axis.log) for line in lines]
    smooth = [line._replace(points=points) for line, (points, _) in zip(lines, means)]
    neighbours = max((count for _, count in means), default=0)
    inner = tag(
        "svg",
        *(curve(a, axis, steps, "raw" * bool(b.points)) for a, b in zip(drawn, smooth)),
        *(curve(line, axis, steps, "smooth") for line in smooth if line.points),
        x=LEFT - EDGE,
        y=TOP,
        width=WIDTH + 2 * EDGE,
        height=HEIGHT,
        viewBox=f"{-EDGE} 0 {WIDTH + 2 * EDGE} {HEIGHT}",
    )
    picture = tag(
        "svg",
        grid(axis, steps),
        event_marks(events, steps),
        inner,
        *(beyond(line, axis, steps) for line in drawn),
        tag("path", class_="cursor"),
        viewBox=f"0 0 {LEFT + WIDTH + RIGHT} {TOP + HEIGHT + BOTTOM}",
        role="img",
        aria_label=in_words(kind, lines),
    )
    plot = tag("div", picture, class_="plot", data_chart=data(drawn, steps), data_title=kind.title)
    return tag(
        "figure",
        caption(kind, name, axis),
        plot,
        reading(lines),
        notes(lines, axis, neighbours),
        class_="chart",
    )


def caption(kind: Kind, name: str, axis: Axis) -> Html:
    facts = [kind.unit, kind.better, "logarithmic axis" if axis.log else ""]
    return tag(
        "figcaption",
        tag("h4", kind.title),
        tag("p", kind.says, class_="says") if kind.says else None,
        tag("p", " · ".join(filter(None, facts)), tag("code", name), class_="facts"),
    )


def curve(line: Line, axis: Axis, steps: Steps, kind: str = "") -> Html:
    """The line, broken at its gaps, with a mark at each point where these are few or alone."""
    parts = split(line.points)
    path, marks = [], []
    marked = kind != "smooth"
    few = sum(map(len, parts)) <= MARKED
    for part in parts:
        places = [(steps.x(step), y_of(value, axis)) for step, value in part]
        if len(places) > 1:
            path.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places))
        marks += places if marked and (few or len(places) == 1) else []
    style = f"run{line.style % STYLES}"
    drawn = tag("path", d="".join(path), class_=f"line {kind} {style}".replace("  ", " "))
    shape = MARKS[line.style % len(MARKS)]
    return join(
        drawn if path else None,
        [
            tag("path", d=shape, class_=f"mark {style}", transform=f"translate({x:.1f} {y:.1f})")
            for x, y in marks
        ],
    )


def y_of(value: float, axis: Axis) -> float:
    return HEIGHT * (1 - min(max(axis.share(value), -FAR), 1 + FAR))


def grid(axis: Axis, steps: Steps) -> Html:
    """Lines and labels of both axes."""
    parts = []
    for value, label in zip(axis.ticks(), labels(axis.ticks())):
        y = TOP + y_of(value, axis)
        parts.append(tag("path", d=f"M{LEFT} {y:.1f}h{WIDTH}", class_="grid"))
        parts.append(tag("text", label, x=LEFT - 6, y=f"{y + 4:.1f}", class_="y"))
    bottom = TOP + HEIGHT
    parts.append(tag("path", d=f"M{LEFT} {bottom}h{WIDTH}", class_="axis"))
    for step in ticks(steps.first, steps.last):
        x = LEFT + steps.x(step)
        parts.append(tag("path", d=f"M{x:.1f} {bottom}v4", class_="axis"))
        parts.append(tag("text", short(step), x=f"{x:.1f}", y=bottom + 17, class_="x"))
    parts.append(tag("text", "step", x=LEFT + WIDTH, y=bottom + 31, class_="end"))
    return join(parts)


def event_marks(events: Sequence[Event], steps: Steps) -> Html:
    """A dashed line at each event, its letter above; letters without room for more share one."""
    places: dict[float, list[str]] = {}
    for event in events:
        if steps.first <= event.step <= steps.last:
            places.setdefault(round(LEFT + steps.x(event.step), 1), []).append(event.letter)
    parts, letters, last = [], {}, -BESIDE
    for x, here in sorted(places.items()):
        parts.append(tag("path", d=f"M{x} {TOP}v{HEIGHT}", class_="event"))
        last = x if x - last >= BESIDE else last
        letters[last] = [*letters.get(last, []), *here]
    for x, here in letters.items():
        text = "".join(dict.fromkeys(here))
        parts.append(tag("text", text, x=x, y=TOP - 6, class_="letter"))
    return join(parts)


def beyond(line: Line, axis: Axis, steps: Steps) -> Html:
    """A small triangle at the edge where values lie outside of the axis."""
    found = {}
    for step, value in line.points:
        if value is not None and not 0 <= axis.share(value) <= 1:
            found.setdefault((round(steps.x(step) / 7), axis.share(value) > 1), steps.x(step))
    shapes = []
    for (_, above), x in found.items():
        y, tip = (TOP, -6) if above else (TOP + HEIGHT, 6)
        shapes.append(f"M{LEFT + x:.1f} {y + tip / 2:g}l3.5 {-tip}h-7z")
    return join(
        tag("path", d="".join(shapes), class_=f"beyond run{line.style % STYLES}")
        if shapes
        else None
    )


def swatch(style: int) -> Html:
    """The line of a run, for legends."""
    return tag(
        "svg",
        tag("path", d="M1 6h32", class_=f"line run{style % STYLES}"),
        tag(
            "path",
            d=MARKS[style % len(MARKS)],
            class_=f"mark run{style % STYLES}",
            transform="translate(17 6)",
        ),
        viewBox="0 0 34 12",
        class_="swatch",
        aria_hidden="true",
    )


def reading(lines: Sequence[Line]) -> Html:
    """The values at the end; the page's script writes those under the pointer in their place."""
    rows = []
    for line in lines:
        step, value = last_point(line.points)
        text = "no finite value" if value is None else f"{figure(value)} at step {step:,}"
        head = (
            tag("dt", swatch(line.style), tag("bdi", line.name))
            if line.name
            else tag("dt", "value")
        )
        rows.append(tag("div", head, tag("dd", text)))
    return tag("dl", *rows, class_="reading")


def last_point(points: Sequence[Point]) -> Point:
    return next((point for point in reversed(points) if point[1] is not None), (0, None))


def notes(lines: Sequence[Line], axis: Axis, neighbours: int) -> Html:
    """What the picture does not show, or shows otherwise than it is."""
    found = []
    if axis.outside:
        values = [v for line in lines for _, v in line.points if v is not None]
        found.append(
            f"{axis.outside:,} of {len(values):,} values lie outside of the axis "
            f"(triangles): from {figure(min(values))} to {figure(max(values))}."
        )
    if gaps := sum(v is None for line in lines for _, v in line.points):
        found.append(f"Gaps: {gaps:,} log line(s) without a finite value.")
    kind = "geometric means" if axis.log else "means"
    text = f" Smoothed: {kind} of up to {neighbours} neighbouring points."
    smooth = tag("span", text, class_="smooth-note") if neighbours else None
    return tag("p", " ".join(found), smooth, class_="notes")


def in_words(kind: Kind, lines: Sequence[Line]) -> str:
    """The chart for who does not see it."""
    words = [f"{kind.title} over steps{f', {kind.unit}' if kind.unit else ''}."]
    for line in lines:
        finite = [(v, s) for s, v in line.points if v is not None]
        if finite:
            name = f"{line.name}: " if line.name else "It goes "
            (low, at_low), (high, at_high) = min(finite), max(finite)
            words.append(
                f"{name}from {figure(finite[0][0])} at step {finite[0][1]:,} to "
                f"{figure(finite[-1][0])} at step {finite[-1][1]:,}; smallest "
                f"{figure(low)} at {at_low:,}, largest {figure(high)} at {at_high:,}."
            )
    return " ".join(words)


def data(lines: Sequence[Line], steps: Steps) -> str:
    """What the page's script reads values from."""
    points = [
        [[s, None if v is None else float(f"{v:.5g}")] for s, v in line.points] for line in lines
    ]
    geometry = {
        "left": LEFT,
        "top": TOP,
        "width": WIDTH,
        "height": HEIGHT,
        "total": LEFT + WIDTH + RIGHT,
        "first": steps.first,
        "last": steps.last,
    }
    return json.dumps(geometry | {"lines": points}, separators=(",", ":"))


def event_list(events: Sequence[tuple[str, Event]], steps: Steps) -> Html:
    """What the letters in the charts mean: (run's name, or "" for all, event)."""
    items = []
    for name, event in events[:MOST_EVENTS]:
        later = " (not reached yet)" if event.step > steps.last else ""
        where = [tag("bdi", name), ": "] if name else []
        items.append(
            tag(
                "li",
                tag("b", event.letter),
                f" step {event.step:,}: ",
                *where,
                f"{event.words}{later}",
            )
        )
    if len(events) > MOST_EVENTS:
        items.append(tag("li", f"and {len(events) - MOST_EVENTS:,} more"))
    return tag("ul", *items, class_="events") if items else escape("")
