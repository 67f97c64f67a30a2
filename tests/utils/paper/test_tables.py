"""Rows, configs and published numbers agree; the commands ask for the published protocol.

python -m pytest tests/utils/paper/test_tables.py
"""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

import evaluate_fid
import sample_ddp
import train_repae
from models.checks.errors import UserError
from utils.config.load import flat, load_config
from utils.config.schema import Config
from utils.paper import tables
from utils.paper.tables import ROOT
from utils.sampling.settings import SamplingSettings

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
    r"6/no-stop-grad|11/naive": {"loss.diffusion.vae": 1.0},
    r"6/(no-b|no-g|f)|[^61]|1/|12/": {"loss.diffusion.vae": 0.0},
    r"6/no-batch-norm": {"latent_norm.enabled": False},
    r"6/(no-s|no-g|f)|[^6]": {"latent_norm.enabled": True},
    r"6/no-gan": {"loss.reg.gan": 0},
    r"6/(no-s|no-b|f)|[^6]": {"loss.reg.gan": 0.1},
    r"12/": {"data.resolution": 512, "data.path": "data/imagenet512"},
    r"([1-9]|11|readme)/": {"data.resolution": 256, "data.path": "data/imagenet256"},
    r"": {"run.batch_size": 256, "data.hflip": False, "loss.reg.lpips_double_scaling": True},
}  # fmt: skip


def test_the_config_of_a_row_says_what_the_row_is():
    wrong = []
    for row in TRAINED:
        known = flat(asdict(row.load()))
        expected = {"run.name": Path(row.config).name}
        for pattern, facts in FACTS.items():
            if re.match(pattern, row.name):
                expected |= facts
        wrong += [
            (row.name, name, known[name]) for name in expected if known[name] != expected[name]
        ]
        assert row.step <= known["run.steps"]
    assert not wrong


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


def test_published_numbers_are_those_of_the_paper():
    assert {name: ROWS[name].metrics for name in LITERALS} == LITERALS
    assert all(len(row.metrics) in (1, 3, 5) for row in ROWS.values())
    guided = ROWS["9/e2evavae-800ep-balanced-cfg"]
    assert (guided.cfg_scale, guided.guidance_high, guided.balanced) == (2.4, 0.73, True)
    assert "2504.10483v3" in TABLES["7"].source and TABLES["readme"].confidence == "B"
    assert "Misprint" in TABLES["1"].note


def test_numbers_keep_the_zeros_with_which_they_are_printed():
    assert tables.numbers(ROWS["8/sit-sdvae"].metrics) == "17.20"
    assert tables.numbers(ROWS["6/no-stop-grad"].metrics) == "444.1 / 460.3 / 1.49 / 0.00 / 0.00"
    assert tables.numbers([4.7, None, 160.04, 0.6]) == "4.70 / - / 160.0 / 0.60"


def test_a_row_that_two_tables_print_is_the_same_row():
    for name in ("1/repae-80ep", "11/repae"):
        row, other = ROWS[name], ROWS["7/init-400k"]
        assert (row.metrics, row.config, row.step) == (other.metrics, other.config, other.step)
    assert tables.commands(ROWS["1/repae-80ep"]) == tables.commands(ROWS["7/init-400k"])


def test_a_published_row_needs_a_reason_or_a_config():
    for row in ROWS.values():
        assert bool(row.only) != bool(row.config)
        if row.only:
            with pytest.raises(UserError, match="published only"):
                tables.commands(row)


# --------------------------------------------------------------------------------------
# The headers of the configs.

# GMAC (multiply-adds / 1e9) of one forward of one 256 px image; estimates. Encoders other than
# DINOv2-B: parameters x 257 tokens + attention.
FORWARD = {
    "sdvae": (136, 311), "invae": (69, 126), "vavae": (69, 126), "e2e-vavae": (69, 126),
    "SiT-B": 23, "SiT-L": 80.7, "SiT-XL": 118.6,
    "dinov2-b": 23, "dinov2-l": 81, "clip-l": 81, "ijepa-h": 167,
    "lpips": 20, "discriminator": 3.1,
}  # fmt: skip
SUSTAINED = 200e12  # FLOP/s of one GPU, which LightningDiT reaches on an H800


def training_gmac(c: Config) -> float:
    """GMAC of one training image; a backward pass counts as two forward passes."""
    area, shape = (c.data.resolution / 256) ** 2, c.sit_shape()
    attention = 2 * 256**2 * shape["hidden_size"] * shape["depth"] / 1e9  # quadratic in the tokens
    sit = (FORWARD[c.sit.size.split("/")[0]] - attention) * area + attention * area**2
    teachers = sum(FORWARD[name] for name in c.encoder.names) * area if c.uses_encoder else 0
    encode, decode = (value * area for value in FORWARD[c.vae.name])
    if not c.vae.train:
        return 3 * sit + teachers + encode
    blocks = shape["depth"] if c.loss.diffusion.vae else c.loss.align.depth
    through_sit = 2 * sit * blocks / shape["depth"]  # forward, and backward to its input alone
    lpips = 3 * FORWARD["lpips"] * area if c.loss.reg.lpips else 0  # both images, backward to one
    disc = 8 * FORWARD["discriminator"] * area if c.uses_disc else 0  # 2 in the VAE phase, 6 own
    return 3 * sit + teachers + 3 * (encode + decode) + through_sit + lpips + disc


# GMAC for each training image, of the FLOP table that the estimates come from; with cached latents
# there, hence the encoder's forward beside.
GMAC = {
    "imagenet256/repae-sdvae-xl2": (1870, 0),
    "imagenet256/repae-vavae-xl1": (1120, 0),
    "ablations/repae-sdvae-l2": (1750, 0),
    "imagenet256/repa-sdvae-xl2": (379, 136),
    "ablations/repa-sdvae-l2": (265, 136),
}


def test_the_cost_model_of_the_headers_gives_the_known_figures():
    for name, (cached, encode) in GMAC.items():
        config = load_config([ROOT / "configs" / f"{name}.yaml"])
        assert training_gmac(config) == pytest.approx(cached + encode, rel=0.005), name


def test_the_headers_state_the_numbers_and_the_hours():
    for path in CONFIGS:
        header, config = path.read_text().split("\nbase:")[0], load_config([path])
        name = str(path.relative_to(ROOT / "configs").with_suffix(""))
        rows = [row for row in TRAINED if row.config == name]
        for row in rows:
            assert row.step != config.run.steps or f"{row.metrics[0]:g}" in header, row.name
        seconds = training_gmac(config) * 2e9 * config.run.batch_size / SUSTAINED
        for row in rows:
            hours = seconds * row.step / 3600
            assert row.gpu_hours() == pytest.approx(hours, rel=0.02), row.name
        assert f"--config {path.relative_to(ROOT)}" in header


# --------------------------------------------------------------------------------------
# Commands.


def script_words(command: list[str]) -> list[str]:
    return command[next(i for i, word in enumerate(command) if word.endswith(".py")) + 1 :]


@pytest.mark.parametrize(
    "row", {row.tag: row for row in TRAINED}.values(), ids=lambda row: row.name
)
def test_commands_parse_and_ask_for_the_published_protocol(row):
    """One row for each combination of step, labels and guidance."""
    train, sample, evaluate = map(script_words, tables.commands(row))
    args = train_repae.parse_args(train)
    config = load_config([ROOT / args.config[0]], args.overrides)
    assert config.run.steps == row.step
    asked = sample_ddp.parse_args(sample)
    assert asked.checkpoint == config.run_dir / "checkpoints" / f"{row.step:07d}"
    assert asked.num_samples == 50_000
    settings = SamplingSettings.from_args(asked)
    assert (settings.solver, settings.steps) == ("sde", 250)
    assert (settings.uint8, settings.precision, settings.tf32) == ("truncate", "fp32", True)
    assert (settings.class_balanced, settings.cfg_scale) == (row.balanced, row.cfg_scale)
    assert (settings.guidance_low, settings.guidance_high) == (0.0, row.guidance_high)
    asked = evaluate_fid.parse_args(evaluate)
    assert asked.samples == sample[sample.index("--out") + 1]
    assert asked.features == "inception" and asked.pr_mode == "adm_fp16"


def test_the_checkpoint_of_every_row_is_kept_and_has_the_reference_of_its_resolution():
    for row in TRAINED:
        run = row.load().run
        assert run.milestone_every and row.step % run.milestone_every == 0, row.name
        *_, evaluate = tables.commands(row)
        reference = evaluate[evaluate.index("--reference") + 1]
        assert ("512" in reference) == row.name.startswith("12/"), row.name


@pytest.mark.parametrize("name", ["7/scratch-100k", "8/sit-e2evavae", "12/repae", "3/clip-l-repa"])
@pytest.mark.slow
def test_the_training_command_passes_its_dry_run(name, monkeypatch, capsys):
    words = script_words(tables.commands(ROWS[name])[0])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["train_repae.py", *words, "--dry-run"])
    assert not train_repae.main()
    assert "parameters" in capsys.readouterr().out
