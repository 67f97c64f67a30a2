"""Evaluations: those of the training, and records of evaluate_fid.py with their protocol, beside
published numbers where that is fair, or with the reason why it is not."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.evaluation.options import sampling_settings
from utils.paper.measured import Measured, measured_of
from utils.paper.tables import METRIC_NAMES, Table, all_rows, load_tables, printed
from utils.report.catalog import LOWER, kind_of
from utils.report.collect import Run, is_number
from utils.report.markup import Html, figure, join, table, tag
from utils.report.sections import names

# what a foreign file that looks like a record may raise
FOREIGN = (LookupError, TypeError, ValueError, AttributeError)


def evaluations(runs: Sequence[Run]) -> Html:
    """Everything that was measured on whole sets of images."""
    parts = [online(runs)]
    tables = load_tables() if any(run.records for run in runs) else {}
    for run in runs:
        for path, record in run.records:
            try:
                parts.append(record_part(run, path, record, tables))
            except FOREIGN:
                run.notes.append(f"{path.name} is left out: evaluate_fid.py writes other records")
    parts = [part for part in parts if part]
    if parts:
        return join(parts)
    command = "python evaluate_fid.py --samples FILE --reference FILE --out RUN/evaluation.json"
    return tag(
        "p",
        "Nothing was evaluated. Set eval.every for evaluations in training, or write a "
        "record into the folder of the run: ",
        tag("code", command),
    )


def online(runs: Sequence[Run]) -> Html | None:
    """Last and best value of each eval/... metric."""
    found = dict.fromkeys(n for run in runs for n in run.series if n.startswith("eval/"))
    if not found:
        return None
    rows = [[tag("code", name), *(cell(run, name) for run in runs)] for name in found]
    text = (
        "Evaluations during training; the number of images is part of each name. Published "
        "numbers, of 50,000 images, are not comparable with them"
    )
    return table(text, ["metric", *names(runs)], rows)


def cell(run: Run, name: str) -> str:
    points = [(v, s) for s, v in run.series.get(name, []) if v is not None]
    if not points:
        return "-"
    better = kind_of(name).better
    text = f"{figure(points[-1][0])} at step {points[-1][1]:,}"
    if not better or len(points) == 1:
        return text
    value, step = (min if better == LOWER else max)(points)
    return f"{text}; best {figure(value)} at step {step:,}"


# --------------------------------------------------------------------------------------
# Records of evaluate_fid.py.


def record_part(run: Run, path: Path, record: dict, tables: dict[str, Table]) -> Html:
    """One record: its numbers, how they were measured, and published ones."""
    title = tag("h3", tag("bdi", run.name), ": ", tag("code", str(path.relative_to(run.path))))
    numbers = table("Measured", ["metric", "value", "remark"], [*metric_rows(record)])
    facts = tag(
        "dl",
        [tag("div", tag("dt", name), tag("dd", value)) for name, value in protocol(record)],
        class_="protocol",
    )
    return join(title, numbers, facts, published(path, record, tables))


def metric_rows(record: dict) -> Iterator[list[object]]:
    for name, value in record["metrics"].items():
        details = record.get("details", {}).get(name) or {}
        remark = ""
        if is_number(times := details.get("times_floor")):
            floor = figure(details["floor"])
            remark = f"{times:.2f} times its floor, {floor}: two halves of the reference"
        elif is_number(std := details.get("std")):
            remark = f"standard deviation over splits {figure(std)}"
        shown = figure(value) if is_number(value) else ", ".join(map(figure, value))
        yield [tag("code", name), shown, remark]


def protocol(record: dict) -> Iterator[tuple[str, str]]:
    """What has to be known with the numbers."""
    samples, features = record["samples"], record["features"] or {}
    settings = sampling_settings(samples.get("record"))
    yield "images", f"{record['n']:,}, {' x '.join(map(str, samples.get('size', [])))} px"
    if settings:
        yield "sampled with", ", ".join(sampling_words(settings))
    if samples.get("label_sampling"):
        yield "labels", samples["label_sampling"]
    origin = (samples.get("record") or {}).get("checkpoint")
    if origin:
        yield "checkpoint", origin
    reference = record.get("reference") or {}
    if reference.get("name"):
        count = f", {reference['n']:,} images" if is_number(reference.get("n")) else ""
        yield "reference", f"{reference['name']}{count}"
    if features.get("label"):
        yield "features", features["label"]
    for warning in record.get("warnings", []):
        yield "warning", warning


def sampling_words(settings: dict) -> Iterator[str]:
    """How the images were sampled, as far as it is known."""
    for name, words in (("solver", "solver {}"), ("steps", "{} steps")):
        if name in settings:
            yield words.format(settings[name])
    scale = settings.get("cfg_scale")
    if scale == 1:
        yield "without guidance"
    elif scale is not None:
        low, high = settings.get("guidance_low", 0), settings.get("guidance_high", 1)
        channels = settings.get("cfg_channels")
        some = f" of the first {channels} channels" if channels else ""
        yield f"guidance {scale}{some} for t from {low} to {high}"
    for name, words in (("precision", "{}"), ("uint8", "uint8: {}"), ("seed", "seed {}")):
        if name in settings:
            yield words.format(settings[name])


def published(path: Path, record: dict, tables: dict[str, Table]) -> Html:
    """Published numbers of the row that the samples are of, if they may stand side by side."""
    pairs = [
        (row, m)
        for row in all_rows(tables).values()
        for m in measured_of(row, [Measured(path, record)])
    ]
    fair = [(row, m) for row, m in pairs if not m.not_comparable]
    if not fair:
        reasons = list(dict.fromkeys(r for _, m in pairs for r in m.not_comparable))
        reasons = (
            reasons
            or record.get("not_comparable_because")
            or ["the samples are of no run and step that the paper's tables have a row for"]
        )
        return tag("p", "Not comparable with published numbers: ", "; ".join(reasons), ".")
    heads = ["whose", *(name.removesuffix("-50K") for name in METRIC_NAMES), "protocol"]
    rows = []
    for row, m in fair:
        all_of = [*row.metrics, *[None] * len(METRIC_NAMES)][: len(METRIC_NAMES)]
        largest = [max(filter(None, pair), default=0) for pair in zip(all_of, m.values)]
        rows.append([f"published, Table {row.name}", *with_bars(all_of, largest), ""])
        differs = f"differs: {'; '.join(m.differs)}" if m.differs else "as published"
        rows.append(["measured here", *with_bars(m.values, largest), differs])
    return table("Published beside measured; each bar begins at 0", heads, rows)


def with_bars(values: Sequence[float | None], largest: Sequence[float]) -> list[Html]:
    """Each number with a bar below it: its share of the largest of its column."""
    cells = []
    for value, most, text in zip(values, largest, printed(values)):
        bar = (
            tag("span", class_="bar", style=f"width: {100 * value / most:.1f}%") if value else None
        )
        cells.append(join(text, bar))
    return cells
