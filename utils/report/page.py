"""report.html: one or several runs as one page that fetches nothing, the same for the same runs."""

from collections.abc import Sequence
from pathlib import Path

from utils.files import write_atomically
from utils.process.written import GENERATOR, PAGE, check_kind
from utils.report import charts, gallery, results, sections
from utils.report.catalog import GROUPS, grouped, kind_of
from utils.report.collect import Run, read_runs
from utils.report.events import Event, events_of
from utils.report.markup import Html, join, tag
from utils.report.scales import BUCKETS

HERE = Path(__file__).parent
MANY = 200  # points of a line, from which on it is smoothed unless the reader says otherwise
MOST_CHARTS = 150  # metrics beyond are listed with their last values


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in these folders to `out`. `UserError` for a folder that is no
    run's, and if `out` is a file that is no report."""
    check_kind("the report", out, PAGE)
    write_atomically(out, page(read_runs(runs)))


def page(runs: Sequence[Run]) -> str:
    """The whole document."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = {
        "Summary": join(sections.summary(runs), sections.main_numbers(runs)),
        "Pictures": gallery.gallery(runs),
        "Evaluation": results.evaluations(runs),
        "Curves": curves(runs),
        "Settings": sections.settings(runs),
        "Versions and starts": sections.provenance(runs),
    }
    there = {name: part for name, part in parts.items() if part}
    links = tag(
        "nav",
        tag("ul", [tag("li", tag("a", name, href=f"#{anchor(name)}")) for name in there]),
        aria_label="Parts of this page",
    )
    head = tag(
        "header",
        tag("p", "Report of a training run, REPA-E", class_="over"),
        tag("h1", heading(runs)),
        links,
    )
    body = [
        tag("section", tag("h2", name), part, id=anchor(name), aria_label=name)
        for name, part in there.items()
    ]
    main = tag("main", problems(runs), body, id="main")
    skip = tag("a", "Skip to the content", href="#main", class_="skip")
    return document(f"{title}: report", join(skip, head, main))


def document(title: str, body: Html) -> str:
    style, script = (Html((HERE / name).read_text()) for name in ("report.css", "report.js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    whole = tag("html", head, tag("body", body, tag("script", script)), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def heading(runs: Sequence[Run]) -> Html:
    return join([[", " if i else None, tag("bdi", run.name)] for i, run in enumerate(runs)])


def problems(runs: Sequence[Run]) -> Html | None:
    """What could not be read, and the warnings of the runs; called when all else has been read."""
    items = sections.problems(runs)
    if not items:
        return None
    heading = tag("h2", "To be looked at")
    return tag("section", heading, tag("ul", items, class_="problems"), aria_label="Problems")


def curves(runs: Sequence[Run]) -> Html | None:
    """A chart for every metric, by groups, with the events of the runs."""
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    names = [name for name in names if not name.startswith(sections.WARNING)]
    if not names:
        return None
    ends = [
        step
        for run in runs
        for points in run.series.values()
        for step in (points[0][0], points[-1][0])
    ]
    steps = charts.Steps(min(0, *ends), max(ends))
    events = [(run.name, event) for run in runs for event in events_of(run)]
    marks = sorted({event for _, event in events})
    pixel, parts, number = sections.pixel_kind(runs), [], 0
    for group, members in grouped(names).items():
        drawn = []
        for name in members:
            lines = [
                charts.Line(run.name if len(runs) > 1 else "", i, run.series[name])
                for i, run in enumerate(runs)
                if name in run.series
            ]
            kind = kind_of(name, pixel)
            number += 1
            if number <= MOST_CHARTS:
                drawn.append(charts.chart(kind, name, lines, marks, steps))
            else:
                drawn.append(tag("div", tag("h4", name), charts.reading(lines), class_="chart"))
        parts += [
            tag("h3", group),
            tag("p", GROUPS[group], class_="says"),
            tag("div", *drawn, class_="charts"),
        ]
    longest = max(len(points) for run in runs for points in run.series.values())
    return join(controls(longest), charts.event_list(shared(events, runs), steps), parts)


def controls(longest: int) -> Html:
    """The choice of smooth lines, made already where there are many points, and what is drawn."""
    box = tag("input", type="checkbox", id="smooth", checked=longest > MANY)
    label = tag("label", box, " smooth the lines (the raw ones stay, pale)")
    text = f"Of a line of more than {4 * BUCKETS:,} points, only the extremes of each of {BUCKETS} "
    thinned = tag("p", f"{text}stretches are drawn, so that no spike is lost.", class_="remarks")
    return join(tag("p", label, class_="controls"), thinned if longest > 4 * BUCKETS else None)


def shared(events: Sequence[tuple[str, Event]], runs: Sequence[Run]) -> list[tuple[str, Event]]:
    """Each event once, by step, with the names of its runs unless it is one of all."""
    owners: dict[Event, list[str]] = {}
    for name, event in events:
        owners.setdefault(event, []).append(name)
    return [
        ("" if len(own) == len(runs) else ", ".join(own), event)
        for event, own in sorted(owners.items())
    ]
