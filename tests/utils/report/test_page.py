"""The report of runs: whole and closed HTML that fetches nothing, everything of a run in it.

python -m pytest tests/utils/report
"""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.checks.errors import UserError
from utils.config.load import load_config, to_yaml
from utils.evaluation.references.known import KNOWN
from utils.report import charts, gallery
from utils.report.collect import read_run, read_runs, unique_names
from utils.report.events import events_of
from utils.report.markup import VOID
from utils.report.page import write_report

EVIL = "<script>alert('x')</script>\"&<img src=http://evil/x onerror=y>"
SETTINGS = ("run.steps=100", "loss.reg.gan_start=30", "disc.pretrain_steps=10", "run.seed=3")


class Reader(HTMLParser):
    """The elements of a page; fails where a tag is not closed in its place."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.open += [tag] * (tag not in VOID)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def values(self, *names: str) -> list[str]:
        return [a[name] for _, a in self.elements for name in names if name in a]


def make_run(folder: Path, *settings: str, rows=None, steps=100, pictures=(50, 100)) -> Path:
    """The folder of a run as train_repae.py leaves it, without checkpoints."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config([], [*SETTINGS, *settings])))
    if rows is None:
        rows = [{"step": s, "loss/sit/diffusion": 1 / s, "images_per_second": 50.0}
                for s in range(10, steps + 1, 10)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"step": 0, "time": "2026-07-01T12:00:00+00:00", "checkpoint": None, "ranks": 2,
             "device": "H100", "versions": {"torch": "2.11.0", "commit": "abc"}}  # fmt: skip
    again = start | {"step": 60, "checkpoint": "0000060", "time": "2026-07-02T12:00:00+00:00"}
    back = {"step": 80, "time": "2026-07-02T13:00:00+00:00", "event": "rollback"}
    lines = [json.dumps(line) + "\n" for line in (start, again, back)]
    (folder / "sessions.jsonl").write_text("".join(lines))
    (folder / "samples").mkdir()
    for step in pictures:
        pixels = np.random.default_rng(step).integers(0, 255, (16, 24, 3), np.uint8)
        for kind in ("", "-reconstructions", "-latents"):
            Image.fromarray(pixels).save(folder / "samples" / f"{step:07d}{kind}.png")
    return folder


def report(*runs: Path) -> str:
    out = runs[0] / "report.html"
    write_report(runs, out)
    return out.read_text()


@pytest.fixture
def evil(tmp_path):
    """A run whose names, classes and metrics are written by an enemy."""
    rows = [{"step": s, EVIL: s * 1.0, "grad_norm/vae": None if s == 20 else 1.0, "text": "x",
             "images_per_second": 9.0, "huge": 10**400} for s in (10, 20, 30)]  # fmt: skip
    run = make_run(tmp_path / EVIL.replace("/", "|"), f"data.path={EVIL}", rows=rows)
    record = {"metrics": {EVIL: 1.0}, "samples": {"size": [EVIL, 1]}, "features": {"label": EVIL},
              "n": 10, "warnings": [EVIL], "not_comparable_because": [EVIL]}  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(record))
    (run / "foreign.json").write_text(json.dumps(record | {"metrics": [1], "samples": None}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "loss/si')
    (run / "samples" / "0000075.png").write_bytes(b"no picture")
    return run


def test_a_page_is_closed_fetches_nothing_and_escapes_what_files_say(evil):
    text = report(evil, make_run(evil.parent / "b"))
    page = Reader(text)
    ids = page.values("id")
    assert len(ids) == len(set(ids)) and {"pictures", "curves", "step-slider"} <= set(ids)
    assert all(v.startswith(("#", "data:image/webp;base64,")) for v in page.values("src", "href"))
    assert not re.search(r"url\(|@import|<link|<iframe|fetch\(|XMLHttp", text)
    # one script and one style, both ours; the enemy's is text
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == tags.count("style") == 1
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert EVIL in "".join(page.text)
    said = "".join(page.text)
    assert "1 line(s) of metrics.jsonl are no whole line" in said
    assert "0000075.png is left out" in said and "foreign.json is left out" in said


def test_the_same_runs_give_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "a")
    assert report(run) == report(run)
    copy = shutil.copytree(run, tmp_path / "elsewhere" / "a")
    assert report(copy) == report(run)


def test_every_metric_is_there_and_unknown_ones_too(tmp_path):
    names = ["loss/vae/pixel", "new/metric", "eval/FID-1k", "eval/FID-1k/floor", "lr/sit"]
    rows = [{"step": s} | dict.fromkeys(names, 0.5 + s) for s in (1, 2)]
    page = Reader(report(make_run(tmp_path / "a", rows=rows)))
    shown = [a["data-title"] for _, a in page.elements if "data-chart" in a]
    assert len(shown) == len(names) and "new/metric" in shown
    assert all(name in page.text for name in names)


def test_events_stand_at_their_steps(tmp_path):
    run = read_run(make_run(tmp_path / "a"), "a")
    found = {(e.letter, e.step) for e in events_of(run)}
    assert found == {("D", 10), ("G", 40), ("R", 60), ("B", 80), ("E", 100)}
    steps = charts.Steps(0, 100)
    drawn = str(charts.event_marks(events_of(run), steps))
    marks = dict(re.findall(r'<text x="([\d.]+)"[^>]*>(\w+)</text>', drawn))
    places = {letter: float(x) for x, letter in marks.items()}
    for letter, step in found:
        assert places[letter] == pytest.approx(charts.LEFT + charts.WIDTH * step / 100, abs=0.1)


def test_settings_that_differ_stand_side_by_side(tmp_path):
    a, b = (make_run(tmp_path / n, f"run.seed={n}", f"vae.optim.lr={n}e-5") for n in "12")
    page = Reader(report(a, b))
    first = page.text.index("Settings in which the runs differ")
    part = page.text[first : page.text.index(" are not the default", first)]
    assert {"run.seed", "vae.optim.lr", "1e-05", "2e-05"} <= set(part)
    assert "loss.reg.gan_start" not in part and "loss.reg.gan_start" in page.text


def test_runs_of_one_name_are_told_apart_and_one_run_is_shown_once(tmp_path):
    a, b = (make_run(tmp_path / parent / "tiny") for parent in "xy")
    assert [run.name for run in read_runs([a, b, a])] == ["x/tiny", "y/tiny"]
    assert unique_names([Path("/1/q/a"), Path("/2/q/a"), Path("/b")]) == ["1/q/a", "2/q/a", "b"]


def test_a_run_that_goes_on_an_old_one_and_an_empty_one_have_pages_too(tmp_path):
    going = make_run(tmp_path / "a", steps=50)
    assert "not finished: 50 of 100 steps (50%)" in report(going)
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.jsonl").write_bytes(b"")
    page = Reader(report(old))
    assert "its settings cannot be read" in "".join(page.text)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: None])
def test_what_is_no_run_is_one_line(make, tmp_path):
    make(tmp_path / "a")
    with pytest.raises(UserError, match="folder of a run") as error:
        write_report([tmp_path / "a"], tmp_path / "r.html")
    assert "\n" not in str(error.value) and not (tmp_path / "r.html").exists()


def test_a_file_that_is_no_report_is_kept(tmp_path):
    run, out = make_run(tmp_path / "a"), tmp_path / "mine.html"
    out.write_text("<p>mine")
    with pytest.raises(UserError, match="is not a report"):
        write_report([run], out)
    assert out.read_text() == "<p>mine"


def test_pictures_are_limited_and_the_last_one_is_shown_without_the_script(tmp_path):
    run = make_run(tmp_path / "a", pictures=range(1, 60))
    page = Reader(report(run))
    images = [a for tag, a in page.elements if tag == "img"]
    assert len(images) <= gallery.MOST_PICTURES
    shown = [a for a in images if "hidden" not in a]
    assert [a["data-step"] for a in shown] == ["59"] * 3 and all(a["alt"] for a in images)
    assert {"1", "59"} <= {a["data-step"] for a in images}


def test_a_record_of_the_full_protocol_stands_beside_published_numbers(tmp_path):
    name, step = "repae-sdvae-xl2", "0400000"
    run = make_run(tmp_path / name)
    (adm,) = (sha256 for sha256, each in KNOWN.items() if each.of_adm_suite)
    record = {
        "metrics": {"gFID-50K": 4.2, "sFID-50K": 4.6, "IS-50K": 160.04, "precision": 0.7},
        "n": 50_000, "features": {"label": "inception", "published_weights": True},
        "samples": {"size": [256, 256], "record": {
            "settings": {"solver": "sde"}, "checkpoint": str(run / "checkpoints" / step)}},
        "reference": {"name": "ref.npz", "file_sha256": adm},
    }  # fmt: skip
    (run / "evaluation.json").write_text(json.dumps(record))
    text = report(run)
    cells = re.findall(r'<td>([\d.]+)<span class="bar" style="width: ([\d.]+)%">', text)
    # zeros stay, and a bar is the share of the larger number of its column
    assert ("4.07", f"{100 * 4.07 / 4.2:.1f}") in cells and ("4.60", "100.0") in cells
    assert ("4.20", "100.0") in cells and ("160.0", f"{100 * 160.04 / 161.8:.1f}") in cells
    (run / "evaluation.json").write_text(json.dumps(record | {"n": 1000}))
    text = report(run)
    assert 'class="bar"' not in text and "1000 images, not 50000" in text


def test_words_and_lines_stand_out_in_both_schemes():
    css = (Path(gallery.__file__).parent / "report.css").read_text()
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in css.split("@media")[:2]]
    for colours in schemes:
        for back in ("page", "card"):
            assert all(contrast(colours[c], colours[back]) >= 4.5 for c in ("text", "soft", "link"))
            runs = [c for c in colours if c.startswith("run")]
            assert len(runs) == charts.STYLES
            assert all(contrast(colours[c], colours[back]) >= 3 for c in [*runs, "focus"])
        assert contrast(colours["warn"], colours["warn-back"]) >= 4.5


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, as WCAG 2 defines it: 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted(map(luminance, (one, other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
