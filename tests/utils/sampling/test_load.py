"""What is given as a checkpoint, and what stands where samples are to be written.

python -m pytest tests/utils/sampling/test_load.py
"""

import json
import os
import shutil

import pytest
import torch

from models.checks.errors import UserError
from tests.test_sample_ddp import CLASSES, make_checkpoint
from tests.tiny import run_here
from utils.checkpoint import Checkpoints
from utils.sampling.load import load_networks, open_checkpoint
from utils.sampling.settings import SamplingSettings

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ["--num-samples", "4", "--batch-size", "2", "--steps", "2", "--solver", "ode-heun"]
FLAGS += ["--precision", "fp32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def sample(checkpoint, out, *more) -> int:
    words = ["--checkpoint", checkpoint, "--out", out, *FLAGS, *more]
    return run_here("sample_ddp.py", *words)


def config(part: str, **changes):
    def edit(folder):
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def content(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def fifo(name: str):
    def edit(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


WEIGHTS = "diffusion_pytorch_model.safetensors"
DAMAGES = {
    "a depth that is a text": config("sit_ema", depth="2"),
    "a depth of -1": config("sit_ema", depth=-1),
    "a depth of 10^9": config("sit_ema", depth=10**9),
    "another depth": config("sit_ema", depth=3),
    "no width": config("sit_ema", hidden_size=None),
    "half a class": config("sit_ema", num_classes=8.5),
    "no classes": config("sit_ema", num_classes=0),
    "no patches": config("sit_ema", patch_size=0),
    "heads that do not divide": config("sit_ema", num_heads=3),
    "a share that is NaN": config("sit_ema", class_dropout_prob=float("nan")),
    "encoders that are a text": config("sit_ema", encoder_dims="abc"),
    "another network": config("sit_ema", _class_name="X"),
    "a list": content("sit_ema/config.json", "[]"),
    "half a config": content("sit_ema/config.json", "{"),
    "a FIFO as config": fifo("sit_ema/config.json"),
    "no weights": content(f"sit_ema/{WEIGHTS}", ""),
    "weights that are a text": content(f"sit_ema/{WEIGHTS}", "hello"),
    "a FIFO as weights": fifo(f"sit_ema/{WEIGHTS}"),
    "a VAE of another kind": config("vae", _class_name="UNet"),
    "a VAE of other channels": config("vae", latent_channels=8),
    "a VAE of texts": config("vae", block_out_channels="x"),
    "a VAE without weights": content(f"vae/{WEIGHTS}", ""),
    "a state that is a list": content("state.json", "[]"),
    "an empty state": content("state.json", ""),
    "a state of a wrong type": content("state.json", '{"step": "x", "files": {}}'),
    "a state with an unknown path": content("state.json", '{"step": 4, "path": "zigzag"}'),
    "another hash": content("state.json", '{"step": 4, "files": {"sit_ema/config.json": "00"}}'),
    "a FIFO as state": fifo("state.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_written(
    damage, checkpoint, tmp_path, capsys
):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    DAMAGES[damage](folder)
    assert sample(folder, tmp_path / "o.npz") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(folder) in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_what_is_no_checkpoint_is_named_and_the_right_one_with_it(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    kinds = {"absent": "no such folder", "file": "an empty file", "fifo": "a FIFO"}
    for name, kind in kinds.items():
        assert sample(tmp_path / name, tmp_path / "o.npz") == 2
        assert kind in capsys.readouterr().err
    run = tmp_path / "run"

    def write(draft):
        shutil.copytree(checkpoint, draft, dirs_exist_ok=True)

    Checkpoints(run).save(7, write, {})
    newest = run / "checkpoints" / "0000007"
    assert sample(newest / "sit_ema", tmp_path / "o.npz") == 2
    assert f"name the checkpoint around it, {newest}" in capsys.readouterr().err
    assert sample(newest, tmp_path / "o.npz") == 0
    capsys.readouterr()
    for name in (run, run / "checkpoints"):
        assert sample(name, tmp_path / "o.npz") == 0
        assert "nothing to do" in capsys.readouterr().out  # these are the same samples


PLANS = {"empty": "", "a list": "[]", "a text": '"x"', "a number": "1", "deep": "[" * 99_999,
         "another plan": '{"block": 3}'}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_is_none_is_one_line(plan, checkpoint, tmp_path, capsys):
    (tmp_path / "o.shards").mkdir()
    (tmp_path / "o.shards" / "plan.json").write_text(PLANS[plan])
    assert sample(checkpoint, tmp_path / "o.npz") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "o.shards" in line


def test_what_stands_in_the_way_of_the_samples_is_refused_before_they_are_made(
    checkpoint, tmp_path, capsys
):
    places = {"o.png": "mkdir", "o.labels.npy": "mkdir", "o.json": "mkdir", "o.shards": "touch"}
    for name, make in places.items():
        folder = tmp_path / name
        folder.mkdir()
        getattr(folder / name, make)()
        assert sample(checkpoint, folder / "o.npz") == 2
        assert str(folder / name) in capsys.readouterr().err
    assert sample(checkpoint, tmp_path / "p.npz", "--num-samples", "1e12") == 2
    assert "are free in" in capsys.readouterr().err
    assert not (tmp_path / "p.shards").exists()


def test_guidance_needs_a_null_label_but_a_picture_of_progress_goes_without(
    tmp_path, capsys, monkeypatch
):
    folder = make_checkpoint(tmp_path / "checkpoint", class_dropout_prob=0.0)
    with pytest.raises(UserError, match="null label"):
        open_checkpoint(folder, SamplingSettings(cfg_scale=2.0))
    words = ["progress", folder, "--num", 2, "--steps", 2, "--precision", "fp32"]
    words += ["--out", tmp_path / "p.png"]
    assert run_here("scripts/visualize_latents.py", *words) == 0
    assert "without guidance" in capsys.readouterr().out and (tmp_path / "p.png").is_file()


def test_a_whole_checkpoint_is_loaded(checkpoint):
    opened = open_checkpoint(checkpoint, SamplingSettings())
    assert (opened.resolution, opened.num_classes) == (16, CLASSES)
    sit, _ = load_networks(checkpoint, opened.settings, torch.device("cpu"))
    assert not sit.training
