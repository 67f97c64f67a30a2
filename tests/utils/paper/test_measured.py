"""What is measured never stands in a table where it should not, and what differs is said.

python -m pytest tests/utils/paper/test_measured.py
"""

import json
import re
from pathlib import Path

import pytest

from utils.paper import tables
from utils.paper.measured import Measured, find_measured, measured_of
from utils.paper.showing import listing, markdown

TABLES = tables.load_tables()
ROWS = tables.all_rows(TABLES)


def shown(folder: Path, table: str = "7") -> str:
    return markdown(TABLES[table], find_measured(folder))


def cells(text: str, name: str) -> list[list[str]]:
    """The cells behind the name, of each line of a row."""
    lines = [x for x in text.splitlines() if x.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]


def test_the_full_protocol_stands_beside_the_published_numbers(measured):
    text = shown(measured())
    published, same, other, why = cells(text, "7/init-400k")[0]
    # zeros stay: 4.60 is not 4.6
    assert published == "4.07 / 4.60 / 161.8 / 0.76 / 0.62"
    assert (same, other, why) == ("4.11 / 4.50 / 160.2 / 0.75 / 0.61", "", "")
    assert "Not comparable" not in text
    assert cells(text, "7/init-200k")[0][1:] == ["", "", ""]
    assert "arXiv 2504.10483v3" in text and "Confidence A" in text


DIFFERENT = {
    "labels balanced, not random": {"settings": {"class_balanced": True}},
    "solver ode-euler, not sde; steps 50, not 250": {
        "settings": {"solver": "ode-euler", "steps": 50}
    },
    "uint8 round, not truncate": {"settings": {"uint8": "round"}},
    "precision bf16, not fp32; tf32 False, not True": {
        "settings": {"precision": "bf16", "tf32": False}
    },
    "timestep_shift 0.3, not 1.0": {"settings": {"timestep_shift": 0.3}},
    "cfg_channels 3, not 0": {"settings": {"cfg_channels": 3}},
    "precision and recall fp32, not adm_fp16": {
        "protocol": {"precision_recall": {"mode": "fp32"}}
    },
    "trained with loss.align.vae=1.0, not 1.5": {"overrides": ["loss.align.vae=1.0"]},
    "training settings unknown": {"config": False},
}  # fmt: skip


@pytest.mark.parametrize("said", DIFFERENT)
def test_each_difference_is_said_in_a_column_of_its_own(said, measured):
    folder = measured(**DIFFERENT[said])
    _, same, other, why = cells(shown(folder), "7/init-400k")[0]
    assert (same, other) == ("", "4.11 / 4.50 / 160.2 / 0.75 / 0.61")
    assert sorted(why.split("; ")) == sorted(said.split("; "))


def test_what_changes_no_number_is_no_difference(measured):
    overrides = ["run.steps=800000", "run.compile=true", "data.path=/else", "preview.every=0"]
    folder = measured(overrides=overrides, settings={"seed": 3})
    assert cells(shown(folder), "7/init-400k")[0][3] == ""


def test_the_settings_of_an_older_version_are_compared_under_their_new_names(measured):
    """`disc.alone_steps`, `loss.diffusion.to_vae` as a flag, settings that did not exist."""
    folder = measured()
    file = folder / "repae-sdvae-xl2" / "config.yaml"
    text = file.read_text().replace("pretrain_steps:", "alone_steps:")
    lines = [x for x in text.splitlines() if not x.startswith("    vae: 0.0")]
    assert len(lines) == len(text.splitlines()) - 1
    at = lines.index("  diffusion:")
    file.write_text("\n".join([*lines[: at + 1], "    to_vae: false", *lines[at + 1 :]]))
    assert cells(shown(folder), "7/init-400k")[0][3] == ""


TIMM = "timm:test_resnet@judge.safetensors#12345678"
EXCLUDED = {
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
    "reference VIRTUAL_imagenet256_labeled.npz, whose sha256 is not known": {
        "reference": {"name": "VIRTUAL_imagenet256_labeled.npz", "file_sha256": "0" * 64},
    },
    "the samples are stored with loss": {
        "comparability": {"gFID-50K": ["the samples are stored with loss"]},
    },
    "the reference statistics are not those of a published file": {
        "not_comparable_because": ["the reference statistics are not those of a published file"],
    },
    "images of [128, 128] pixels, not 256": {"samples": {"size": [128, 128]}},
}  # fmt: skip


@pytest.mark.parametrize("why", EXCLUDED)
def test_what_is_not_comparable_never_enters_the_table(why, measured):
    """Although the record claims that it is comparable."""
    folder = measured(**EXCLUDED[why])
    table, _, below = shown(folder).partition("**Not comparable with the published numbers**")
    assert "4.11" not in table and "4.11" in below and why in below
    line = next(x for x in listing(TABLES, find_measured(folder)) if why in x)
    assert "not comparable" in line and "4.11" not in line


def test_a_metric_that_is_not_comparable_leaves_its_place_in_the_row_empty(measured):
    against = {name: [] for name in tables.METRIC_NAMES} | {"recall": ["distances fp32"]}
    folder = measured(comparability=against, protocol={"precision_recall": {"mode": "fp32"}})
    _, same, other, why = cells(shown(folder), "7/init-400k")[0]
    assert (same, other) == ("", "4.11 / 4.50 / 160.2 / 0.75 / -")
    assert why == "no recall: distances fp32"


def test_a_guided_record_belongs_to_the_guided_row(measured):
    text = shown(measured("readme/sdvae-cfg", settings={"cfg_scale": 2.0}), "readme")
    assert cells(text, "readme/sdvae")[0][1:] == ["", "", ""]
    assert cells(text, "readme/sdvae-cfg")[0][3] == "cfg_scale 2.0, not 2.2"


def test_several_records_of_a_row_have_a_line_each(measured):
    measured()
    folder = measured(file="rounded.json", settings={"uint8": "round"})
    assert len(cells(shown(folder), "7/init-400k")) == 2


def test_the_listing_names_every_row_and_records_of_no_row(measured):
    folder = measured()
    other = {"metrics": {}, "samples": {"record": None}, "features": None, "n": 5}
    (folder / "other.json").write_text(json.dumps(other))
    (folder / "broken.json").write_text("{")
    text = "\n".join(listing(TABLES, find_measured(folder)))
    assert all(f"  {name} " in text for name in ROWS)
    assert text.count("same protocol") == 4  # tables 1, 7, 11 and the README's
    assert f"of no row: {folder / 'other.json'}" in text and "broken" not in text


def test_the_quickstart_is_of_no_row():
    record = {"samples": {"record": {"checkpoint": "exps/quickstart/checkpoints/0000360"}}}
    found = [Measured(Path("e.json"), record)]
    assert not any(measured_of(row, found) for row in ROWS.values())


def test_a_bar_in_a_text_does_not_end_its_cell(measured):
    text = shown(measured(settings={"solver": "a|b"}))
    assert "solver a\\|b, not sde" in text
    row = next(line for line in text.splitlines() if line.startswith("| 7/init-400k |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
