"""Rows, configs and published numbers agree; what is measured never stands where it should not.

python -m pytest tests/scripts/test_reproduce_tables.py
"""

import json
import re
import sys
from pathlib import Path

import pytest

import evaluate_fid
import sample_ddp
import train_repae
from models.errors import UserError
from scripts import reproduce_tables as tables
from utils import cli
from utils.config import load_config, to_yaml

ROOT = Path(__file__).resolve().parents[2]
TABLES = tables.load_tables()
ROWS = tables.all_rows(TABLES)
TRAINED = [row for row in ROWS.values() if row.config]
CONFIGS = {p for d in ("ablations", "imagenet256", "imagenet512")
           for p in (ROOT / "configs" / d).glob("*.yaml") if p.stem != "base"}  # fmt: skip

# Typed from the paper's tables, not from published.yaml. gFID alone, or all five.
LITERALS = {
    "1/sit-1400ep": [8.61, 6.32, 131.7, 0.68, 0.67],
    "1/repa-40ep": [11.10, 5.05, 100.4, 0.69, 0.64],  # Table 1's own 6.06 / 67.4 is a misprint
    "1/repae-80ep": [4.07, 4.60, 161.8, 0.76, 0.62],
    "2/sit-b-repa": [49.5, 7.00, 27.5, 0.46, 0.59],
    "2/sit-b-repae": [34.8, 6.31, 39.1, 0.57, 0.59],
    "2/sit-xl-repae": [12.8, 5.04, 88.8, 0.71, 0.58],
    "3/ijepa-h-repa": [23.0, 5.81, 60.3, 0.62, 0.60],
    "3/clip-l-repae": [23.4, 6.44, 57.1, 0.62, 0.60],
    "3/dinov2-l-repae": [16.0, 5.59, 77.7, 0.68, 0.58],
    "4/invae-repae": [12.7, 5.57, 84.0, 0.69, 0.62],
    "4/vavae-repa": [12.8, 6.47, 83.8, 0.71, 0.58],
    "5/depth6-repae": [16.4, 6.64, 74.3, 0.67, 0.59],
    "5/depth10-repa": [23.7, 5.91, 56.9, 0.62, 0.60],
    "6/no-stop-grad": [444.1, 460.3, 1.49, 0.00, 0.00],
    "6/no-batch-norm": [18.1, 5.32, 72.4, 0.67, 0.59],
    "6/no-gan": [19.2, 6.47, 68.2, 0.64, 0.58],
    "6/full": [16.3, 5.69, 75.0, 0.68, 0.60],
    "7/scratch-100k": [14.12, 7.87, 83.5, 0.70, 0.59],
    "7/scratch-400k": [4.34, 4.44, 154.3, 0.75, 0.63],
    "7/repa-400k": [7.90, 5.06, 122.6, 0.70, 0.65],
    "8/dit-sdvae-repa": [12.29],
    "8/sit-sdvae": [17.20],
    "8/sit-vavae": [5.93],
    "8/sit-e2evavae": [5.26],
    "8/sit-vavae-repa": [4.88],
    "8/sit-e2evavae-repa": [3.46],
    "9/e2evavae-800ep-balanced": [1.69, 4.17, 219.3, 0.77, 0.67],
    "9/e2evavae-800ep-balanced-cfg": [1.12, 4.09, 302.9, 0.79, 0.66],
    "11/lsgm": [9.89, 5.07, 107.5, 0.72, 0.61],
    "12/repa": [22.2, 5.68, 58.3, 0.74, 0.60],
    "12/repae": [12.8, 4.60, 90.6, 0.79, 0.61],
    "readme/invae-cfg": [1.61],
    "readme/e2evavae-800ep": [1.83],
}

# Pattern of rows => what their configs must say. Every pattern that fits a row applies.
FACTS = {
    r"1/|2/sit-xl|7/|11/|readme/sdvae": {"sit.size": "SiT-XL/2", "vae.name": "sdvae"},
    r"8/sit-sdvae|9/repa": {"sit.size": "SiT-XL/2", "vae.name": "sdvae"},
    r"4/sdvae": {"sit.size": "SiT-L/2", "vae.name": "sdvae"},
    r"2/sit-b": {"sit.size": "SiT-B/2", "vae.name": "sdvae"},
    r"(2/sit-l|3|5|6|12)(-|/)": {"sit.size": "SiT-L/2", "vae.name": "sdvae"},
    r"4/(in|va)vae": {"sit.size": "SiT-L/1"},
    r"(4|readme)/invae": {"vae.name": "invae"},
    r"(4|readme)/vavae|8/sit-vavae": {"vae.name": "vavae"},
    r"8/sit-(e2e)?vavae|9/e2e|readme/(in|va|e2eva)vae": {"sit.size": "SiT-XL/1"},
    r"(8/sit-|9/|readme/)e2evavae": {"vae.name": "e2e-vavae"},
    r"[1-9]+/.*repa(-|$)|1/sit|8/|9/|readme/e2e": {"vae.train": False},
    r"[1-9]+/.*repae|6/|7/(init|scratch)|11/|readme/(sd|in|va)vae": {"vae.train": True},
    r"1/sit|8/sit-\w+$": {"loss.align.sit": 0, "loss.align.vae": 0},
    r".*repa(e|-|$)|6/|7/|9/|readme/": {"loss.align.sit": 0.5},
    r".*repae|7/|6/|readme/": {"loss.align.vae": 1.5},
    r"7/scratch": {"vae.weights": None},
    r"([1-68]|9|1[12]|readme)/": {"vae.weights": "hub"},
    r"3/ijepa-h": {"encoder.names": ["ijepa-h"]},
    r"3/clip-l": {"encoder.names": ["clip-l"]},
    r"3/dinov2-l": {"encoder.names": ["dinov2-l"]},
    r"3/dinov2-b|[^3]": {"encoder.names": ["dinov2-b"]},
    r"5/depth6": {"loss.align.depth": 6},
    r"5/depth10": {"loss.align.depth": 10},
    r"5/depth8|[^5]": {"loss.align.depth": 8},
    r"6/no-stop-grad|11/naive": {"loss.diffusion.to_vae": True},
    r"6/(no-b|no-g|f)|[^61]|1/|12/": {"loss.diffusion.to_vae": False},
    r"6/no-batch-norm": {"latent_norm.enabled": False},
    r"6/(no-s|no-g|f)|[^6]": {"latent_norm.enabled": True},
    r"6/no-gan": {"loss.reg.gan": 0},
    r"6/(no-s|no-b|f)|[^6]": {"loss.reg.gan": 0.1},
    r"12/": {"data.resolution": 512, "data.path": "data/imagenet512"},
    r"([1-9]|11|readme)/": {"data.resolution": 256, "data.path": "data/imagenet256"},
    r"": {"run.batch_size": 256, "data.hflip": False, "loss.reg.lpips_double_scaling": True},
}  # fmt: skip


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_the_config_of_a_row_says_what_the_row_is(row):
    known = tables.flat(tables.asdict(row.load()))
    wanted = {}
    for pattern, facts in FACTS.items():
        if re.match(pattern, row.name):
            wanted |= facts
    assert {name: known[name] for name in wanted} == wanted
    assert row.step <= known["run.steps"]
    assert known["run.name"] == Path(row.config).name


def test_steps_are_the_epochs_or_steps_that_the_table_says():
    for row in TRAINED:
        epochs = re.search(r"(\d+)ep", row.name)
        thousands = re.search(r"(\d+)k$", row.name)
        if epochs:
            assert row.step == int(epochs[1]) * 5000
        elif thousands:
            assert row.step == int(thousands[1]) * 1000
        else:
            ablation = row.name.split("/")[0] in ("2", "3", "4", "5", "6", "12")
            assert row.step == (100_000 if ablation else 400_000)


def test_every_config_serves_a_row_and_runs_have_names_of_their_own():
    assert {ROOT / row.path for row in TRAINED} == CONFIGS
    assert len({path.stem for path in CONFIGS}) == len(CONFIGS)


@pytest.mark.parametrize("path", sorted(CONFIGS), ids=lambda p: p.stem)
def test_the_header_states_the_numbers_and_the_hours(path):
    header = path.read_text().split("\nbase:")[0]
    config = load_config([path])
    name = str(path.relative_to(ROOT / "configs").with_suffix(""))
    for row in TRAINED:
        if row.config == name and row.step == config.run.steps:
            assert f"{row.metrics[0]:g}" in header, row.name
    hours = float(re.search(r"about ([\d,]+) GPU-hours", header)[1].replace(",", ""))
    assert hours == pytest.approx(tables.gpu_hours(config, config.run.steps), rel=0.02)
    assert f"--config {path.relative_to(ROOT)}" in header


def test_published_numbers_are_those_of_the_paper():
    assert {name: ROWS[name].metrics for name in LITERALS} == LITERALS
    assert all(len(row.metrics) in (1, 3, 5) for row in ROWS.values())
    guided = ROWS["9/e2evavae-800ep-balanced-cfg"]
    assert (guided.cfg_scale, guided.guidance_high, guided.balanced) == (2.4, 0.73, True)
    assert "2504.10483v3" in TABLES["7"]["source"] and TABLES["readme"]["confidence"] == "B"
    assert "Misprint" in TABLES["1"]["note"]


def test_a_row_that_two_tables_print_is_the_same_row():
    for table, name in (("1", "repae-80ep"), ("11", "repae")):
        row, other = ROWS[f"{table}/{name}"], ROWS["7/init-400k"]
        assert (row.metrics, row.config, row.step) == (other.metrics, other.config, other.step)
    assert tables.commands(ROWS["1/repae-80ep"]) == tables.commands(ROWS["7/init-400k"])


# GMAC for each training image, of paper_tables.md section 2; frozen VAEs there use cached latents.
GMAC = {
    "imagenet256/repae-sdvae-xl2": (1870, 0),
    "imagenet256/repae-vavae-xl1": (1120, 0),
    "ablations/repae-sdvae-l2": (1750, 0),
    "imagenet256/repa-sdvae-xl2": (379, 136),
    "ablations/repa-sdvae-l2": (265, 136),
}


@pytest.mark.parametrize("name", GMAC)
def test_the_cost_model_gives_the_known_figures(name):
    cached, encode = GMAC[name]
    config = load_config([ROOT / "configs" / f"{name}.yaml"])
    assert tables.training_gmac(config) == pytest.approx(cached + encode, rel=0.005)


def test_hours_of_an_ablation_row():
    assert tables.gpu_hours(ROWS["6/full"].load(), 100_000) == pytest.approx(124, abs=0.5)


# --------------------------------------------------------------------------------------
# Commands.


def script_words(command: list[str]) -> list[str]:
    return command[next(i for i, word in enumerate(command) if word.endswith(".py")) :]


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row.name)
def test_commands_parse_and_ask_for_the_published_protocol(row, monkeypatch):
    train, sample, evaluate = map(script_words, tables.commands(row))
    monkeypatch.setattr(sys, "argv", train)
    args = train_repae.parse_args()
    config = load_config([ROOT / args.config[0]], args.overrides)
    assert config.run.steps == row.step
    assert config.run.milestone_every and row.step % config.run.milestone_every == 0
    monkeypatch.setattr(sys, "argv", sample)
    asked = sample_ddp.parse_args()
    assert asked.checkpoint == config.run_dir / "checkpoints" / f"{row.step:07d}"
    assert (asked.num_samples, asked.solver, asked.steps) == (50_000, "sde", 250)
    assert (asked.uint8, asked.precision, asked.tf32) == ("truncate", "fp32", True)
    assert (asked.class_balanced, asked.cfg_scale) == (row.balanced, row.cfg_scale)
    asked = evaluate_fid.parse_args(evaluate[1:])
    evaluate_fid.read_options(asked)
    evaluate_fid.check_args(asked)
    assert asked.samples == sample[sample.index("--out") + 1]
    assert ("512" in asked.reference) == (row.name.startswith("12/"))


@pytest.mark.parametrize("name", ["7/scratch-100k", "8/sit-e2evavae", "12/repae", "3/clip-l-repa"])
def test_the_training_command_passes_its_dry_run(name, monkeypatch, capsys):
    words = script_words(tables.commands(ROWS[name])[0])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*words, "--dry-run"])
    assert not train_repae.main()
    assert "parameters" in capsys.readouterr().out


def call(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce_tables.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.run(tables.main)
    return ended.value.code or 0


def test_command_prints_three_lines_to_paste(monkeypatch, capsys):
    assert call(monkeypatch, "command", "2/sit-xl-repae", "--processes", 4) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("#")]
    assert [re.search(r"(\w+)\.py", line)[1] for line in lines] == [
        "train_repae", "sample_ddp", "evaluate_fid",
    ]  # fmt: skip
    assert lines[0].endswith("run.steps=100000") and "--num_processes 4" in lines[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["command", "7/init-40k"], "no row 7/init-40k: nearest is 7/init-400k"),
        (["command", "8/dit-vavae"], "8/dit-vavae is published only: DiT backbone"),
        (["command", "9/e2evavae-80ep-cfg"], "guidance scale is not published"),
        (["show", "--table", "redme"], "no table redme: nearest is readme"),
        (["show", "--tabel"], "unrecognized arguments: --tabel"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(words, said, monkeypatch, capsys):
    assert call(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------
# Measured beside published.


@pytest.fixture
def measured(tmp_path):
    """Write a record as evaluate_fid.py would, of a run beside it; defaults: the full protocol."""

    def write(name="7/init-400k", file="e.json", **changes) -> Path:
        row = ROWS[name]
        run = tmp_path / Path(row.config).name
        run.mkdir(exist_ok=True)
        if changes.pop("config", True):
            trained = load_config([ROOT / row.path], changes.pop("overrides", []))
            (run / "config.yaml").write_text(to_yaml(trained))
        settings = tables.sampling(row) | {"timestep_shift": 1.0, "path": "linear"}
        settings |= changes.pop("settings", {})
        values = [4.11, 4.5, 160.2, 0.75, 0.61]
        record = {
            "metrics": dict(zip(tables.METRICS, values)),
            "comparable_to_papers": True,
            "not_comparable_because": [],
            "n": 50_000,
            "samples": {
                "size": [row.load().data.resolution] * 2,
                "record": {
                    "settings": settings,
                    "checkpoint": str(run / "checkpoints" / f"{row.step:07d}"),
                },
            },
            "reference": {"name": tables.REFERENCES[row.load().data.resolution]},
            "features": {"label": "inception", "published_weights": True},
            "protocol": {"precision_recall": {"mode": "adm_fp16"}},
        } | changes
        (run / file).write_text(json.dumps(record))
        return tmp_path

    return write


def shown(folder: Path, monkeypatch, capsys, table="7") -> str:
    assert call(monkeypatch, "show", "--table", table, "--results", folder) == 0
    return capsys.readouterr().out


def cells(text: str, name: str) -> list[list[str]]:
    """The cells behind the name, of each line of a row."""
    lines = [x for x in text.splitlines() if x.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]


def test_the_full_protocol_stands_beside_the_published_numbers(measured, monkeypatch, capsys):
    text = shown(measured(), monkeypatch, capsys)
    published, same, other, why = cells(text, "7/init-400k")[0]
    assert published == "4.07 / 4.6 / 161.8 / 0.76 / 0.62"
    assert (same, other, why) == ("4.11 / 4.5 / 160.2 / 0.75 / 0.61", "", "")
    assert "Not comparable" not in text
    assert cells(text, "7/init-200k")[0][1:] == ["", "", ""]
    assert "arXiv 2504.10483v3" in text and "Confidence A" in text


SOFT = {
    "labels balanced, not random": {"settings": {"class_balanced": True}},
    "solver ode-euler, not sde; steps 50, not 250": {
        "settings": {"solver": "ode-euler", "steps": 50}
    },
    "uint8 round, not truncate": {"settings": {"uint8": "round"}},
    "precision bf16, not fp32; tf32 False, not True": {
        "settings": {"precision": "bf16", "tf32": False}
    },
    "timestep_shift 0.3, not 1.0": {"settings": {"timestep_shift": 0.3}},
    "precision and recall fp32, not adm_fp16": {
        "protocol": {"precision_recall": {"mode": "fp32"}}
    },
    "trained with loss.align.vae=1.0, not 1.5": {"overrides": ["loss.align.vae=1.0"]},
    "training settings unknown": {"config": False},
}  # fmt: skip


@pytest.mark.parametrize("said", SOFT)
def test_each_difference_is_flagged_in_a_column_of_its_own(said, measured, monkeypatch, capsys):
    changes = (
        {k: v.copy() for k, v in SOFT[said].items()} if "config" not in SOFT[said] else SOFT[said]
    )
    _, same, other, why = cells(shown(measured(**changes), monkeypatch, capsys), "7/init-400k")[0]
    assert (same, other, why) == ("", "4.11 / 4.5 / 160.2 / 0.75 / 0.61", said)


def test_what_changes_no_number_is_no_difference(measured, monkeypatch, capsys):
    overrides = ["run.steps=800000", "run.compile=true", "data.path=/else", "preview.every=0"]
    text = shown(measured(overrides=overrides), monkeypatch, capsys)
    assert cells(text, "7/init-400k")[0][3] == ""


TIMM = "timm:test_resnet@judge.safetensors#12345678"
BARRED = {
    "1000 images, not 50000": {"n": 1000, "metrics": {"FID@1000": 4.11, "sFID@1000": 4.5}},
    f"feature network {TIMM}": {
        "features": {"label": TIMM, "published_weights": False}, "metrics": {f"FD[{TIMM}]": 4.11},
    },
    "feature network inception#0a0b0c0d": {
        "features": {"label": "inception#0a0b0c0d", "published_weights": False},
    },
    "feature network dinov2": {
        "features": {"label": "dinov2", "published_weights": True},
        "metrics": {"FD-DINOv2-50K": 4.11},
    },
    "reference VIRTUAL_imagenet512.npz": {"reference": {"name": "VIRTUAL_imagenet512.npz"}},
    "the reference statistics are not those of a published file": {
        "not_comparable_because": ["the reference statistics are not those of a published file"],
    },
    "images of [128, 128] pixels, not 256": {
        "samples": {"size": [128, 128], "record": None},
    },
}  # fmt: skip


@pytest.mark.parametrize("why", BARRED)
def test_what_is_not_comparable_never_enters_the_table(why, measured, monkeypatch, capsys):
    """Although the record claims that it is comparable."""
    changes = dict(BARRED[why])
    folder = measured(**changes)
    if "samples" in changes:  # keep whose samples they are
        path = folder / "repae-sdvae-xl2" / "e.json"
        record = json.loads(path.read_text())
        checkpoint = folder / "repae-sdvae-xl2" / "checkpoints" / "0400000"
        record["samples"]["record"] = {"checkpoint": str(checkpoint), "settings": {}}
        path.write_text(json.dumps(record))
    text = shown(folder, monkeypatch, capsys)
    table, _, below = text.partition("**Not comparable with the published numbers**")
    assert "4.11" not in table and "4.11" in below and why in below
    assert call(monkeypatch, "list", "--results", folder) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if why in x)
    assert "not comparable" in line and "4.11" not in line


def test_a_guided_record_belongs_to_the_guided_row(measured, monkeypatch, capsys):
    folder = measured("readme/sdvae-cfg", settings={"cfg_scale": 2.0})
    text = shown(folder, monkeypatch, capsys, "readme")
    assert cells(text, "readme/sdvae")[0][1:] == ["", "", ""]
    assert cells(text, "readme/sdvae-cfg")[0][3] == "cfg_scale 2.0, not 2.2"


def test_show_writes_markdown_and_a_picture_for_each_table(measured, monkeypatch, capsys, tmp_path):
    measured()
    measured(file="rounded.json", settings={"uint8": "round"})
    folder = measured(file="small.json", n=1000, metrics={"FID@1000": 30.0})
    out = tmp_path / "out"
    assert call(monkeypatch, "show", "--table", "7", "--results", folder, "--out", out) == 0
    text = (out / "tables.md").read_text()
    assert "(table-7.png)" in text and len(cells(text, "7/init-400k")) == 2
    assert (out / "table-7.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in out.iterdir()} == {"tables.md", "table-7.png"}


def test_the_picture_has_no_bar_for_what_is_not_comparable(measured, monkeypatch, tmp_path):
    heights = []
    monkeypatch.setattr(tables, "bar", lambda axis, y, value, *_: heights.append(value))
    monkeypatch.setattr(tables.plt.Figure, "savefig", lambda *_, **__: None)
    measured(file="small.json", n=1000)
    found = tables.find_measured(measured(file="full.json", metrics={"gFID-50K": 4.5}))
    own = {name: tables.measured_of(row, found) for name, row in TABLES["7"]["rows"].items()}
    tables.draw("7", TABLES["7"], own, tmp_path / "t.png")
    assert sorted(heights) == sorted([*(r.metrics[0] for r in TABLES["7"]["rows"].values()), 4.5])


def test_list_names_every_row_and_records_of_no_row(measured, monkeypatch, capsys):
    folder = measured()
    (folder / "other.json").write_text(json.dumps({"metrics": {}, "samples": {"record": None},
                                                   "features": None, "n": 5}))  # fmt: skip
    (folder / "broken.json").write_text("{")
    assert call(monkeypatch, "list", "--results", folder) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ROWS)
    assert text.count("same protocol") == 4  # tables 1, 7, 11 and the README's
    assert f"of no row: {folder / 'other.json'}" in text and "broken" not in text


def test_the_quickstart_is_of_no_row():
    record = {"samples": {"record": {"checkpoint": "exps/quickstart/checkpoints/0000360"}}}
    found = [tables.Measured(Path("e.json"), record)]
    assert not any(tables.measured_of(row, found) for row in ROWS.values())


def test_a_published_row_needs_a_reason_or_a_config():
    for row in ROWS.values():
        assert bool(row.only) != bool(row.config)
        if row.only:
            with pytest.raises(UserError, match="published only"):
                tables.commands(row)
