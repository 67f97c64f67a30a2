"""train_repae.py as a user runs it: pictures, numbers, evaluation on the way, one-line errors.

python -m pytest tests/test_train.py
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.sit import SiT
from models.vae import load_vae
from tests.tiny import run_here, train, train_here
from utils.checkpoint import Checkpoints
from utils.config.load import read_saved_config
from utils.data.training import open_training_data
from utils.pictures.grid import MARGIN
from utils.pictures.preview import picture_files
from utils.showing.commands import commands
from utils.showing.trackers import PROJECT
from utils.training import networks
from utils.training.sessions import read_sessions
from utils.training.tracking import read_metrics

EVALUATION = ("eval.every=2", "eval.num=24", "eval.features=pixel", "eval.steps=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with everything on."""
    out = tmp_path_factory.mktemp("train")
    extra = ("preview.every=2", "preview.num=8", "preview.steps=2", "run.trackers=[tensorboard]")
    assert train_here(out, *extra, *EVALUATION) == 0
    return out / "tiny"


def test_pictures_and_curves_are_left(run):
    """Eight samples, reconstructions and latents in two pairs of rows, all large enough to be read;
    tensorboard's events have the same pictures and every number of metrics.jsonl."""
    events = EventAccumulator(str(run / "tensorboard" / PROJECT), {"images": 0, "scalars": 0})
    events.Reload()
    for what in ("samples", "reconstructions", "latents"):
        kept = {
            image.step: image.encoded_image_string for image in events.Images(f"pictures/{what}")
        }
        assert sorted(kept) == [2, 4]
        for step, encoded in kept.items():
            picture = Image.open(picture_files(run, step)[what])
            width, height = (side - 2 * MARGIN for side in picture.size)
            assert width >= 8 * 99 and (height - 99 < 30 if what == "samples" else height == 4 * 99)
            assert picture.tobytes() == Image.open(io.BytesIO(encoded)).convert("RGB").tobytes()
    for row in read_metrics(run / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step":
                found = {event.step: event.value for event in events.Scalars(name)}
                assert found[row["step"]] == pytest.approx(value, rel=1e-6)


def test_a_run_ends_with_the_commands_that_go_on_from_it_and_with_its_report(run):
    """The commands of a finished run pass the checks of their programs; its start is recorded."""
    config = read_saved_config(run / "config.yaml")
    sample, evaluate = commands(config, open_training_data(config), Checkpoints(run).path(4))
    for words in (sample, evaluate):
        script = words[words.index(next(word for word in words if word.endswith(".py"))) :]
        assert run_here(Path(script[0]).name, *script[1:], "--dry-run") == 0
    (start,) = read_sessions(run)
    assert (start["step"], start["checkpoint"], start["ranks"]) == (0, None, 1)
    assert "tiny" in (run / "report.html").read_text()


def test_every_term_is_logged_with_its_name(run):
    row = read_metrics(run / "metrics.jsonl")[0]
    expected = {f"loss/vae/{term}" for term in ("pixel", "kl", "gan", "align")}
    expected |= {"loss/disc/hinge", "loss/sit/diffusion", "loss/sit/align"}
    expected |= {f"grad_norm/{net}" for net in ("vae", "disc", "sit")}
    assert expected <= set(row) and row["images_per_second"] > 0
    assert row["seconds_waiting_for_data"] >= 0
    assert (row["lr/vae"], row["lr/sit"], row["lr/disc"]) == (1e-3, 1e-3, 1e-4)


def test_the_logged_learning_rate_is_0_while_a_network_does_not_move(tmp_path):
    """In the steps of disc.pretrain_steps only the discriminator is trained."""
    assert train_here(tmp_path, "disc.pretrain_steps=2", "run.save_every=100") == 0
    alone, joint = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert (alone["lr/vae"], alone["lr/sit"], alone["lr/disc"]) == (0, 0, 1e-4)
    assert (joint["lr/vae"], joint["lr/sit"], joint["lr/disc"]) == (1e-3, 1e-3, 1e-4)


@pytest.mark.slow
def test_a_resumed_run_holds_no_random_sit_beside_the_loaded_ones(tmp_path, monkeypatch):
    """SiT and EMA are built without memory and take the tensors of the files: at XL size, a random
    third one on every rank is 8 x 2.7 GB of RAM."""
    assert train_here(tmp_path, "run.steps=2") == 0
    devices, build = [], networks.build_sit

    def spy(*args):
        sit = build(*args)
        devices.append(sit.device.type)
        return sit

    monkeypatch.setattr(networks, "build_sit", spy)
    monkeypatch.setattr(SiT, "from_pretrained", None)
    assert train_here(tmp_path) == 0
    assert devices and set(devices) == {"meta"}


def test_evaluation_on_the_way_is_named_by_its_size_and_network(run):
    """The same code as evaluate_fid.py, on the EMA weights; 24 images are never called FID."""
    rows = [r for r in read_metrics(run / "metrics.jsonl") if any("eval/" in k for k in r)]
    assert [row["step"] for row in rows] == [2, 4]
    names = [k for k in rows[0] if k.startswith("eval/")]
    assert "eval/FD-24[pixel12]" in names and not any("FID" in name for name in names)


@pytest.mark.slow
def test_channels_last_saves_and_resumes(tmp_path, capsys):
    """Its weights are not contiguous, which safetensors refuses to write as they are."""
    for steps in ("run.steps=2", "run.steps=4"):
        assert train_here(tmp_path, "run.channels_last=true", steps) == 0
    assert train_here(tmp_path, "run.channels_last=true") == 0
    assert "step 4 of 4 is done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_new_run_may_add_a_discriminator_to_a_checkpoint_without_one(tmp_path, capsys):
    """run.init_from of a run without GAN; the run itself cannot go on with one."""
    assert train_here(tmp_path, "run.steps=2", "loss.reg.gan=0") == 0
    origin = tmp_path / "tiny" / "checkpoints" / "0000002"
    assert train_here(tmp_path) == 2
    assert "loss.reg.gan=0.0 (now 0.1)" in capsys.readouterr().err
    assert train_here(tmp_path, "run.allow_change=[loss.reg.gan]") == 2
    assert "has no discriminator" in capsys.readouterr().err
    more = ("run.name=next", f"run.init_from={origin}", "disc.pretrain_steps=1", "run.steps=2")
    assert train_here(tmp_path, *more) == 0
    assert (tmp_path / "next/checkpoints/0000002/discriminator.safetensors").exists()


@pytest.mark.slow
def test_a_compiled_run_agrees_with_an_eager_one(tmp_path):
    """Through inductor on the CPU; two steps, losses to 1 %."""
    rows = []
    for switch in ("false", "true"):
        done = train(tmp_path / switch, f"run.compile={switch}", "run.steps=2")
        assert done.returncode == 0, done.stderr[-2000:]
        rows.append(read_metrics(tmp_path / switch / "tiny" / "metrics.jsonl")[-1])
    for name in (k for k in rows[0] if k.startswith("loss/")):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.01, abs=1e-3), name


@pytest.mark.slow
def test_two_ranks_evaluate_as_one(tmp_path):
    """The samples depend on their index alone; the weights differ by the ranks' own draws, so the
    learning rates are 0."""
    still = [f"{net}.optim.lr=0" for net in ("vae", "sit", "disc")]
    values = []
    for ranks in (1, 2):
        done = train(tmp_path / str(ranks), *EVALUATION, "ema.decay=0.999999", *still, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
        run = tmp_path / str(ranks) / "tiny"
        state = json.loads((run / "checkpoints" / "0000004" / "state.json").read_text())
        assert state["ranks"] == ranks
        rows = read_metrics(run / "metrics.jsonl")
        values.append(next(r["eval/FD-24[pixel12]"] for r in rows if "eval/FD-24[pixel12]" in r))
    assert values[1] == pytest.approx(values[0], rel=1e-3)


def test_diffusers_reads_the_vae_and_reconstructs_as_we_do(run):
    folder = run / "checkpoints" / "0000004" / "vae"
    net, ours = AutoencoderKL.from_pretrained(folder), load_vae(str(folder.parent))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(net(x).sample, ours.decode(ours.encode(x).mean))
    assert len(net.config.latents_mean) == 4


def test_a_checkpoint_samples_and_evaluates(run, tmp_path, capsys):
    """sample_ddp.py, then evaluate_fid.py, on what training left."""
    out = tmp_path / "s.npz"
    checkpoint = run / "checkpoints" / "0000004"
    flags = "--num-samples 20 --class-balanced --solver ode-ab2 --steps 2 --precision fp32"
    assert run_here("sample_ddp.py", "--checkpoint", checkpoint, "--out", out, *flags.split()) == 0
    assert np.load(out)["arr_0"].shape == (20, 16, 16, 3)
    flags = f"--samples {out} --reference digits:test@16 --features pixel --metrics fid"
    capsys.readouterr()
    assert run_here("evaluate_fid.py", *flags.split(), "--cache", "none") == 0
    assert "FD[pixel12]" in capsys.readouterr().out
    assert SiT.from_pretrained(checkpoint / "sit_ema").config.num_classes == 10


MISTAKES = {
    "run.stepz=1": "Did you mean: 'run.steps'",
    "data.num_classes=7": "data.num_classes=7, but the data has 10",
    "data.source=packed": "needs data.path",
    "loss.reg.lpips=1": "vgg16-397923af.pth not found",
    "encoder.weights=[absent.pth]": "no such file",
    "disc.weights=README.md": "README.md",
    "vae.weights=absent": "no such file",
    "eval.every=2": "eval.features, eval.weights",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(override, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no VGG in its cache
    assert train_here(tmp_path, override) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and MISTAKES[override] in errors[0]
    assert not (tmp_path / "tiny" / "checkpoints").exists()
