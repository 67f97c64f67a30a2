"""The digits study: arms that differ in what they name alone, and the command that runs them.

python -m pytest tests/utils/paper/test_digits_study.py
"""

import json
from concurrent.futures import Future
from dataclasses import asdict

import pytest
import torch
from PIL import Image

from models.checks.errors import UserError
from models.vae import build_vae
from tests.tiny import ROOT, run_here
from utils.config.load import flat, load_config, to_yaml
from utils.paper import digits_study as digits
from utils.paper.digits_results import ARMS, METRICS, markdown, plot

DIFFERENCES = {  # from REPA-E
    "repae": set(),
    "no-latent-norm": {"latent_norm.enabled"},
    "naive": {"loss.diffusion.vae", "loss.align.vae"},
    "repa": {"vae.train"},
    "sit": {"vae.train", "loss.align.sit", "loss.align.vae"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_differs_from_repa_e_in_what_its_name_says(arm):
    """So the same VAE, data order, noises, sizes and learning rates, by construction."""
    configs = [load_config([ROOT / f"configs/digits/{name}.yaml"]) for name in ("repae", arm)]
    ours, theirs = (flat(asdict(c)) for c in configs)
    assert {k for k in ours if ours[k] != theirs[k]} - {"run.name"} == DIFFERENCES[arm]
    assert theirs["vae.weights"] == str(digits.OUT / digits.STARTING_VAE)


def test_the_starting_vae_is_the_one_that_is_made():
    config = load_config([ROOT / "configs/digits/vae.yaml"])
    made = config.run_dir / "checkpoints" / f"{config.run.steps:07d}" / "vae"
    assert made == digits.OUT / digits.STARTING_VAE
    assert not config.uses_encoder and not config.uses_disc and config.vae.train


def test_encoder_and_judge_are_of_different_architectures_and_seeds():
    (encoder, *_, one), (judge, *_, other) = digits.CLASSIFIERS.values()
    assert encoder != judge and one != other


def test_table_and_plot_of_planted_numbers(tmp_path):
    """Mean and both seeds; a band as wide as their range."""
    step = dict.fromkeys([*METRICS, "psnr"], 1.0)
    runs = {s: {"100": step, "200": step | {"fd": 2.0 + s}} for s in (0, 1)}
    text = markdown(dict.fromkeys(ARMS, runs))
    assert text.count("| 2.50 (2.00, 3.00) |") == 2 * len(ARMS)  # at the end, and over steps
    assert "REPA-E, no latent norm" in text and "| 100 | 200 |" in text
    plot(dict.fromkeys(ARMS, runs), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 1000


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Everything but its size: few steps, few samples, a random starting VAE."""
    monkeypatch.chdir(tmp_path)
    networks = {"encoder.safetensors": ("test_resnet", 64, 2, 0)}
    networks["judge.safetensors"] = ("test_byobnet", 16, 2, 1)
    monkeypatch.setattr(digits, "CLASSIFIERS", networks)
    monkeypatch.setattr(digits, "NUM", 20)
    torch.manual_seed(0)
    mean, std = torch.zeros(4), torch.ones(4)
    build_vae("tiny-f2d4").save(digits.OUT / digits.STARTING_VAE, mean, std)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return ["run.steps=2", "run.save_every=1", "run.milestone_every=1", "run.batch_size=8"]


class OneAfterAnother:
    """A `ThreadPoolExecutor` without threads: only the main thread may handle signals."""

    def __init__(self, _):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def here(monkeypatch):
    """Run the study's scripts in this process; returns the list of those that ran."""
    ran = []

    def run(words, log=None, jobs=1):
        words = [str(ROOT / w) if w.startswith("configs/") else w for w in words]
        assert run_here(*words) == 0
        ran.append(words)

    monkeypatch.setattr(digits, "run_script", run)
    monkeypatch.setattr(digits, "ThreadPoolExecutor", OneAfterAnother)
    return ran


@pytest.mark.slow
def test_the_command_trains_measures_and_continues(small, here, capsys):
    """All five arms in small; called again it trains and measures nothing twice."""
    digits.run_study([0], 1, small)
    assert len(here) == 2 + 2 * len(ARMS)  # two classifiers; the starting VAE is there
    found = json.loads((digits.OUT / "results.json").read_text())
    assert set(found) == set(ARMS)
    for arm, runs in found.items():
        assert list(runs["0"]) == ["1", "2"]
        moved = runs["0"]["1"]["spatial_variance"] != runs["0"]["2"]["spatial_variance"]
        assert moved == (arm not in ("repa", "sit"))  # a frozen VAE's latents stay
        assert all(v["fd"] > 0 and 0 <= v["label_accuracy"] <= 1 for v in runs["0"].values())
    assert (digits.OUT / "results.png").exists()
    files = {p: p.stat().st_mtime_ns for p in digits.OUT.glob("*/progress.json")}
    capsys.readouterr()
    digits.run_study([0], 1, small)
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert (digits.OUT / "results.md").read_text() in capsys.readouterr().out


def test_results_of_other_settings_are_not_taken_for_these(small):
    """A finished run would end at once, whatever is asked for now."""
    overrides = ["run.name=repae-seed0", "loss.align.vae=0"]
    config = load_config([ROOT / "configs/digits/repae.yaml"], overrides)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match=r"was trained with loss.align.vae=0"):
        digits.run_study([0], 1, [])


def test_a_run_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "ROOT", tmp_path)
    monkeypatch.setattr(digits, "prepare", lambda: None)
    monkeypatch.setattr(digits, "refuse_other_settings", lambda *_: None)
    (tmp_path / "train_repae.py").write_text("raise SystemExit('out of luck')")
    with pytest.raises(UserError, match=r"repae-seed0.*failed: see exps/digits/repae-seed0"):
        digits.run_study([0], 1, [])
    assert "out of luck" in (digits.OUT / "repae-seed0.log").read_text()
