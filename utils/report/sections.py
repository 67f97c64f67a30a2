"""Parts of the page that are tables: summary, main numbers, settings, versions, sessions."""

import re
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from utils.config.load import to_yaml
from utils.config.schema import Config, all_settings
from utils.report.catalog import kind_of
from utils.report.charts import swatch
from utils.report.collect import Run
from utils.report.markup import Html, figure, join, table, tag

UNKNOWN = "not recorded"
WARNING = "warning/"  # begin of the names of warnings among the metrics
# metrics whose last values stand at the top of the page
MAIN = (
    "loss/sit/diffusion",
    "loss/sit/align",
    "loss/vae/pixel",
    "loss/vae/lpips",
    "loss/vae/align",
    "vae/latent_variance",
    "loss/disc/hinge",
)


def names(runs: Sequence[Run]) -> list[Html]:
    """The names of the runs as heads of columns, with their lines if there are several."""
    return [
        join(swatch(i) if len(runs) > 1 else None, tag("bdi", run.name))
        for i, run in enumerate(runs)
    ]


# --------------------------------------------------------------------------------------
# What a run is, and how far it is.


def summary(runs: Sequence[Run]) -> Html:
    facts: dict[str, Callable[[Run], object]] = {
        "State": state,
        "Method": method,
        "Images": images,
        "Networks": networks,
        "Batch and precision": batch,
        "Device": device,
        "Started": started,
        "Speed": speed,
    }
    rows = [[name, *(fact(run) for run in runs)] for name, fact in facts.items()]
    return table("What was run", ["fact", *names(runs)], rows)


def state(run: Run) -> str:
    done = f"{run.steps_done:,}"
    if run.config is None:
        return f"{done} steps done"
    steps = run.config.run.steps
    if run.finished:
        return f"finished: {done} of {steps:,} steps"
    share = run.steps_done / steps
    return f"not finished: {done} of {steps:,} steps ({share:.0%}); it is going on, or has stopped"


def method(run: Run) -> str:
    """What is trained, in the words of the paper."""
    c = run.config
    if c is None:
        return UNKNOWN
    if not c.vae.train:
        return "REPA: frozen VAE, aligned SiT" if c.loss.align.sit else "SiT with a frozen VAE"
    if c.loss.diffusion.vae:
        return "naive end-to-end: the diffusion loss reaches the VAE"
    if c.loss.align.vae and c.loss.align.sit:
        return "REPA-E: VAE and SiT are trained together, aligned with a vision encoder"
    return "VAE and SiT are trained side by side"


def images(run: Run) -> str:
    c, saved = run.config, run.state
    words = []
    if c and saved and saved.epoch and saved.step:
        words.append(f"{round(saved.step * c.run.batch_size / saved.epoch):,} images")
    if saved and saved.classes is not None:
        words.append(
            f"{len(saved.classes):,} classes ({', '.join(saved.classes[:3])}"
            f"{', ...' if len(saved.classes) > 3 else ''})"
        )
    if c:
        path = f" {c.data.path}" if c.data.path else ""
        words.append(f"{c.data.source}{path}, {c.data.resolution} px")
    return ", ".join(words) or UNKNOWN


def networks(run: Run) -> str:
    c = run.config
    if c is None:
        return UNKNOWN
    shape = c.sit_shape()
    own = any((c.sit.depth, c.sit.hidden_size, c.sit.num_heads, c.sit.patch_size))
    words = f"{shape['depth']} blocks, width {shape['hidden_size']}, patch {shape['patch_size']}"
    sit = f"SiT of {words}" if own else c.sit.size
    encoders = f"; aligned with {', '.join(c.encoder.names)}" if c.uses_encoder else ""
    origin = f"of {c.run.init_from}" if c.run.init_from else "random at the start"
    weights = {"hub": "published weights", None: f"weights {origin}"}
    start = weights.get(c.vae.weights, f"weights {c.vae.weights}")
    return f"{sit}; VAE {c.vae.name}, {start}{encoders}"


def batch(run: Run) -> str:
    c = run.config
    return f"{c.run.batch_size:,} images per step, {c.run.precision}" if c else UNKNOWN


def device(run: Run) -> str:
    """The device of the newest start, and the number of processes."""
    newest = next((s for s in reversed(run.sessions) if "device" in s), {})
    ranks = newest.get("ranks") or (run.state and run.state.ranks)
    many = f"{ranks} process{'es' * (ranks != 1)}" if ranks else ""
    return ", ".join(filter(None, [str(newest.get("device") or ""), many])) or UNKNOWN


def started(run: Run) -> str:
    times = [clock(s.get("time")) for s in run.sessions if "event" not in s]
    if not times:
        return UNKNOWN
    again = len(times) - 1
    often = f"{again} times" if again > 1 else "once"
    return times[0] + (f"; started again {often}, last {times[-1]}" if again else "")


def clock(time: object) -> str:
    """A time as sessions.jsonl has it, to the minute: 2026-07-01 12:00 UTC."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d\+00:00", str(time))
    return f"{match[1]} {match[2]} UTC" if match else str(time)


def speed(run: Run) -> str:
    values = [v for _, v in run.series.get("images_per_second", []) if v]
    if not values:
        return UNKNOWN
    rate = median(values)
    words = f"{figure(rate)} images per second (median)"
    if run.config:
        hours = run.steps_done * run.config.run.batch_size / rate / 3600
        words += f"; about {duration(hours)} of training steps"
    return words


def duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def main_numbers(runs: Sequence[Run]) -> Html | None:
    """First and last value of what matters most; of several runs the last ones."""
    found = [name for name in MAIN if any(run.last(name) is not None for run in runs)]
    if not found:
        return None
    kinds = {name: kind_of(name, pixel_kind(runs)) for name in found}
    heads = {
        name: join(k.title, tag("small", f" {k.better}") if k.better else None)
        for name, k in kinds.items()
    }
    if len(runs) == 1:
        series = runs[0].series
        values = {name: [v for _, v in series[name] if v is not None] for name in found}
        rows = [[heads[n], figure(v[0]), figure(v[-1])] for n, v in values.items()]
        return table(
            "Main numbers: averages over the first and the last log line",
            ["number", "at the start", "at the end"],
            rows,
            numeric=True,
        )
    rows = [
        [heads[name], *(figure(v) if (v := run.last(name)) is not None else "-" for run in runs)]
        for name in found
    ]
    return table(
        "Main numbers: averages over the last log line",
        ["number", *names(runs)],
        rows,
        numeric=True,
    )


def pixel_kind(runs: Sequence[Run]) -> str:
    """loss.reg.pixel_kind, where all runs agree."""
    kinds = {run.config.loss.reg.pixel_kind for run in runs if run.config}
    return kinds.pop() if len(kinds) == 1 else ""


# --------------------------------------------------------------------------------------
# Settings.


def settings(runs: Sequence[Run]) -> Html:
    """The settings in which several runs differ; those that are not the default; all of them."""
    known = [run for run in runs if run.config]
    tables = {run.name: values(run.config) for run in known if run.config}
    defaults, parts = values(Config()), []
    if len(known) > 1:
        different = {
            name: [tables[run.name][name] for run in known]
            for name in defaults
            if len({tables[run.name][name] for run in known}) > 1
        }
        rows = [[tag("code", name), defaults[name], *cells] for name, cells in different.items()]
        heads = [join(swatch(runs.index(run)), tag("bdi", run.name)) for run in known]
        parts.append(
            table("Settings in which the runs differ", ["setting", "default", *heads], rows)
            if rows
            else tag("p", "These runs have the same settings.")
        )
    for run in known:
        rows = [
            [tag("code", name), default, tables[run.name][name]]
            for name, default in defaults.items()
            if tables[run.name][name] != default
        ]
        own = table(
            join("Settings of ", tag("bdi", run.name), " that are not the default"),
            ["setting", "default", "here"],
            rows,
        )
        title = join(f"{len(rows)} settings of ", tag("bdi", run.name), " are not the default")
        parts.append(own if len(runs) == 1 else tag("details", tag("summary", title), own))
    for run in known:
        title = join("All settings of ", tag("bdi", run.name), ": config.yaml")
        text = tag("pre", to_yaml(run.config), tabindex="0") if run.config else None
        parts.append(tag("details", tag("summary", title), text))
    if not known:
        parts.append(tag("p", "No settings could be read."))
    return join(parts)


def values(config: Config) -> dict[str, str]:
    """Every setting as text."""
    words = {None: "null", True: "true", False: "false"}
    return {
        name: words[value] if value is None or isinstance(value, bool) else f"{value}"
        for name, _, value in all_settings(config)
    }


# --------------------------------------------------------------------------------------
# Versions and sessions.


def provenance(runs: Sequence[Run]) -> Html:
    found = {run.name: versions(run) for run in runs}
    packages = dict.fromkeys(name for own in found.values() for name in own)
    rows = [[name, *(found[run.name].get(name, "-") for run in runs)] for name in packages]
    parts = [table("Versions", ["package", *names(runs)], rows)] if rows else []
    for run in runs:
        if run.sessions:
            caption = join("Starts and rollbacks of ", tag("bdi", run.name))
            head = ["step", "time", "what", "processes", "device"]
            parts.append(table(caption, head, [session_row(s) for s in run.sessions]))
    return join(parts) if parts else tag("p", "No versions were recorded.")


def versions(run: Run) -> dict[str, str]:
    """Of the newest start, or else of the newest checkpoint."""
    newest: Any = next((s["versions"] for s in reversed(run.sessions) if s.get("versions")), None)
    if not isinstance(newest, dict):
        newest = run.state.versions if run.state else {}
    return {str(name): str(value if value is not None else "-") for name, value in newest.items()}


def session_row(session: dict[str, Any]) -> list[object]:
    origin = session.get("checkpoint")
    what = session.get("event") or (f"resumed from {origin}" if origin else "start")
    cells = (session.get(key, "-") for key in ("ranks", "device"))
    return [session.get("step", "-"), clock(session.get("time", "-")), what, *cells]


def problems(runs: Sequence[Run]) -> list[Html]:
    """The warnings that a run has given, by steps, and what of its folder could not be read."""
    items = []
    for run in runs:
        given = [
            (step, name, value)
            for name, points in run.series.items()
            if name.startswith(WARNING)
            for step, value in points
        ]
        for step, name, value in sorted(given, key=lambda warning: warning[0]):
            kind = kind_of(name)
            unit = f" ({kind.unit}: {figure(value)})" if kind.unit else f" ({figure(value)})"
            words = [f", step {step:,}: {kind.title}{unit}. {kind.says} ", tag("code", name)]
            items.append(tag("li", tag("bdi", run.name), *words))
        items += [tag("li", tag("bdi", run.name), f": {note}") for note in run.notes]
    return items
