"""Never losing work: a run that is stopped, killed or resumed ends as if it had not been.

python -m pytest tests/test_resume.py
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import ROOT, TINY, train, train_here
from utils.checkpoint import find_fault
from utils.training.tracking import read_metrics

# 359 digits in batches of 60: an epoch has 5 steps, so a run resumes in the middle of one
EPOCHS = ("data.split=test", "run.batch_size=60", "run.steps=6", "run.save_every=2")
EPOCHS += ("run.keep_last=9",)


def contents(run: Path, step: int) -> dict[str, bytes]:
    """Every file of a checkpoint but state.json's versions, byte for byte."""
    folder = run / "checkpoints" / f"{step:07d}"
    assert find_fault(folder) is None
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def losses(run: Path) -> list[dict]:
    rows = read_metrics(run / "metrics.jsonl")
    clocks = ("images_per_second", "seconds_waiting_for_data")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert train_here(out, *EPOCHS) == 0
    return out / "tiny"


def test_resume_in_a_new_process_mid_epoch_equals_no_interruption(uninterrupted, tmp_path):
    """Bitwise: all weights, optimizers, EMA, statistics, hashes, and the logged losses."""
    assert train_here(tmp_path, *EPOCHS, "run.steps=4") == 0
    done = train(tmp_path, *EPOCHS)
    assert "going on from" in done.stdout and done.returncode == 0
    assert contents(tmp_path / "tiny", 6) == contents(uninterrupted, 6)
    assert losses(tmp_path / "tiny") == losses(uninterrupted)
    assert (tmp_path / "tiny" / "config.0000004.yaml").is_file()  # run.steps was another


def test_the_checkpoint_has_the_documented_layout(uninterrupted):
    names = set(contents(uninterrupted, 6))
    weights = {f"{net}/diffusion_pytorch_model.safetensors" for net in ("vae", "sit", "sit_ema")}
    assert names == weights | {f"{net}/config.json" for net in ("vae", "sit", "sit_ema")} | {
        "discriminator.safetensors",
        "optim.pt",
        "state.json",
    }
    state = json.loads((uninterrupted / "checkpoints/0000006/state.json").read_text())
    assert (state["step"], state["seed"], state["ranks"]) == (6, 0, 1)
    config = json.loads((uninterrupted / "checkpoints/0000006/vae/config.json").read_text())
    bn = load_file(
        uninterrupted / "checkpoints/0000006/sit_ema/diffusion_pytorch_model.safetensors"
    )
    std = (bn["bn.running_var"] + 1e-4).sqrt()
    assert config["latents_std"] == pytest.approx(std.tolist(), rel=1e-6)
    assert (config["scaling_factor"], config["shift_factor"]) == (1.0, 0.0)


def start(out: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "train_repae.py", *TINY, f"run.out={out}", *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(pattern: str, folder: Path, process: subprocess.Popen) -> None:
    """Until a file matches, or the process ends."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(folder.glob(pattern)):
            return
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["while writing", "while training", "at random", "at random too"]
)
def test_kill_9_then_the_same_command_ends_bit_equal(uninterrupted, tmp_path, moment):
    process = start(tmp_path, *EPOCHS)
    checkpoints = tmp_path / "tiny" / "checkpoints"
    wait_for(".tmp-*/*" if moment == "while writing" else "0000002", checkpoints, process)
    if "random" in moment:
        time.sleep(random.Random(moment).random())
    process.kill()
    process.wait()
    if moment == "while writing":
        assert not (checkpoints / "0000006").exists()
    done = train(tmp_path, *EPOCHS)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "tiny", 6) == contents(uninterrupted, 6)
    assert losses(tmp_path / "tiny") == losses(uninterrupted)
    assert not list(checkpoints.glob(".*"))  # nothing half-written is left


@pytest.mark.parametrize("damage", ["no state", "cut file", "changed byte"])
def test_a_damaged_checkpoint_is_reported_and_passed_over(uninterrupted, tmp_path, damage, capsys):
    run = tmp_path / "tiny"
    shutil.copytree(uninterrupted, run)
    newest = run / "checkpoints" / "0000006"
    if damage == "no state":
        (newest / "state.json").unlink()
    else:
        file = newest / "sit" / "diffusion_pytorch_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data if damage == "changed byte" else data[:-100])
    assert train_here(tmp_path, *EPOCHS) == 0
    output = capsys.readouterr().out
    assert f"ignored {newest}" in output
    assert f"going on from {run / 'checkpoints' / '0000004'}" in output
    assert contents(run, 6) == contents(uninterrupted, 6)


def test_sigterm_saves_and_the_run_goes_on(tmp_path, capsys):
    long = ("run.steps=100000", "run.save_every=100000", "run.log_every=1")
    process = start(tmp_path, *long)
    wait_for("metrics.jsonl", tmp_path / "tiny", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "told to stop at step" in output
    (checkpoint,) = (tmp_path / "tiny" / "checkpoints").glob("[0-9]*")
    assert find_fault(checkpoint) is None
    step = int(checkpoint.name)
    assert train_here(tmp_path, *long, f"run.steps={step + 1}") == 0
    assert f"going on from {checkpoint}" in capsys.readouterr().out


def test_only_the_newest_checkpoints_and_the_milestones_stay(tmp_path):
    keep = ("run.save_every=1", "run.keep_last=2", "run.milestone_every=2", "run.steps=6")
    assert train_here(tmp_path, *keep) == 0
    names = sorted(p.name for p in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert names == ["0000002", "0000004", "0000005", "0000006"]


def test_a_run_that_is_complete_stays_as_it_is(uninterrupted):
    before = contents(uninterrupted, 6)
    assert train_here(uninterrupted.parent, *EPOCHS) == 0
    assert contents(uninterrupted, 6) == before


def test_resume_never_refuses_a_used_name_and_a_path_must_be_whole(uninterrupted, tmp_path, capsys):
    used = uninterrupted.parent
    older = uninterrupted / "checkpoints" / "0000002"
    for out, start, message in (
        (used, "never", "choose another run.name"),
        (tmp_path, tmp_path, "not a whole checkpoint"),
        (used, older, "holds 0000006 too"),
    ):
        assert train_here(out, *EPOCHS, f"run.resume={start}") == 2
        assert message in capsys.readouterr().err
    whole = uninterrupted / "checkpoints" / "0000004"
    assert train_here(tmp_path, *EPOCHS, f"run.resume={whole}") == 0
    assert contents(tmp_path / "tiny", 6) == contents(uninterrupted, 6)


def test_init_from_takes_the_weights_and_nothing_else(uninterrupted, tmp_path):
    """A new run at step 0; with learning rates 0 its weights stay those of the checkpoint."""
    origin = uninterrupted / "checkpoints" / "0000006"
    still = [f"{net}.optim.lr=0" for net in ("vae", "sit", "disc")]
    assert train_here(tmp_path, f"run.init_from={origin}", "run.steps=2", *still) == 0
    end = tmp_path / "tiny" / "checkpoints" / "0000002"
    for name in ("vae/diffusion_pytorch_model.safetensors", "discriminator.safetensors"):
        ours, theirs = load_file(end / name), load_file(origin / name)
        assert all(
            torch.equal(ours[k], theirs[k])
            for k in theirs
            if "running" not in k and "num_b" not in k
        )
    assert read_metrics(tmp_path / "tiny" / "metrics.jsonl")[0]["step"] == 2


def test_a_loss_that_is_not_finite_stops_the_run_at_the_last_good_checkpoint(tmp_path, capsys):
    broken = ("vae.optim.lr=1e30", "vae.optim.clip=0", "run.steps=8", "run.save_every=100")
    assert train_here(tmp_path, "run.steps=2") == 0
    assert train_here(tmp_path, *broken) == 1
    errors = capsys.readouterr().err
    assert "stopped: loss/" in errors and "is not finite at step" in errors
    assert str(tmp_path / "tiny" / "checkpoints" / "0000002") in errors
    assert [p.name for p in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["0000002"]
