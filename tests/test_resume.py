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

from tests.tiny import ROOT, TINY, tiny_config, train, train_here
from utils.checkpoint import find_fault
from utils.config.load import read_saved_config
from utils.distributed import StopSignal
from utils.pictures.preview import Previewer
from utils.process.heartbeat import Stopped
from utils.training import periodic, tracking
from utils.training.online_evaluation import OnlineEvaluation
from utils.training.tracking import read_metrics

# 359 digits in batches of 60: an epoch has 5 steps, so a run resumes in the middle of one
EPOCHS = ("data.split=test", "run.batch_size=60", "run.steps=6", "run.save_every=2")
EPOCHS += ("run.keep_last=9",)


def slow(*values: str) -> list:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


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
        "model_index.json",
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
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if any(folder.glob(pattern)):
            return
        time.sleep(0.002)


@pytest.mark.usefixtures("nothing_is_left")
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
    if "random" not in moment:
        assert process.returncode == -signal.SIGKILL  # it had not ended by itself
    done = train(tmp_path, *EPOCHS)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "tiny", 6) == contents(uninterrupted, 6)
    assert losses(tmp_path / "tiny") == losses(uninterrupted)
    assert not list(checkpoints.glob(".*"))  # nothing half-written is left


@pytest.mark.parametrize("damage", ["changed byte", *slow("no state", "cut file")])
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


@pytest.mark.usefixtures("nothing_is_left")
def test_sigterm_saves_and_the_run_goes_on(tmp_path, capsys):
    long = ("run.steps=100000", "run.save_every=100000", "run.log_every=1")
    process = start(tmp_path, *long)
    wait_for("metrics.jsonl", tmp_path / "tiny", process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
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


# --------------------------------------------------------------------------------------
# The whole folder of a run: what a stop or a kill cuts off is made good.

SHOWN = ("run.steps=6", "run.save_every=3", "run.log_every=4", "run.keep_last=9", "preview.every=3")
SHOWN += ("preview.num=2", "preview.steps=2", "eval.every=3", "eval.num=24", "eval.steps=2")
SHOWN += ("eval.features=pixel", "eval.metrics=[fid]", "eval.batch_size=24", "data.split=test")


def pictures(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "samples").iterdir()}


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shown")
    assert train_here(out, *SHOWN) == 0
    run = out / "tiny"
    assert [row["step"] for row in losses(run)] == [3, 3, 4, 6, 6] and len(pictures(run)) == 6
    return run


def require_equal(run: Path, expected: Path) -> None:
    """Pictures, metrics and the last checkpoint."""
    assert pictures(run) == pictures(expected)
    assert losses(run) == losses(expected)
    assert contents(run, 6) == contents(expected, 6)
    assert not list(run.rglob("*.tmp")) and not (run / ".lock").exists()


@pytest.mark.slow
def test_a_stop_between_two_log_lines_leaves_no_trace(shown, tmp_path, monkeypatch, capsys):
    """Told to stop at steps 2, 3 (when all is due) and 5; nothing but a checkpoint is written."""
    run = tmp_path / "tiny"
    for step in (2, 3, 5):
        monkeypatch.setattr(StopSignal, "agreed", stop_at(run, step))
        monkeypatch.setattr(StopSignal, "check_all", lambda stop: None)
        assert train_here(tmp_path, *SHOWN) == 0
        assert f"told to stop at step {step}" in capsys.readouterr().out
        assert find_fault(run / "checkpoints" / f"{step:07d}") is None
    monkeypatch.undo()
    assert train_here(tmp_path, *SHOWN) == 0
    require_equal(run, shown)


def stop_at(run: Path, step: int):
    """In place of StopSignal.agreed: the answer is yes at `step`."""
    saved = [int(p.name) for p in (run / "checkpoints").glob("[0-9]*")]
    calls = iter(range(max(saved, default=0) + 1, 100))
    return lambda *_: next(calls) == step


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "what",
    [
        "last picture",
        *slow("first picture", "second picture", "third picture", "evaluation", "last evaluation"),
    ],
)
def test_a_preview_or_an_evaluation_that_a_kill_cut_off_is_made_good(
    shown, tmp_path, what, monkeypatch
):
    """Also those of the last step: the same command then does what is missing, and no step."""
    numbers = {"first picture": 0, "second picture": 1, "third picture": 2, "last picture": 5}
    number = numbers.get(what, 9)
    evaluations = {"evaluation": 0, "last evaluation": 1}.get(what, 9)
    done, measured = [], []
    save_picture, measure = tracking.save_picture, OnlineEvaluation.measure

    def cut(path, *rest):
        if len(done) == number:
            path.parent.mkdir(exist_ok=True)
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise Killed
        done.append(save_picture(path, *rest))

    def cut_measure(*args):
        if len(measured) == evaluations:
            raise Killed
        measured.append(1)
        return measure(*args)

    monkeypatch.setattr(tracking, "save_picture", cut)
    monkeypatch.setattr(OnlineEvaluation, "measure", cut_measure)
    with pytest.raises(Killed):
        train_here(tmp_path, *SHOWN)
    monkeypatch.undo()
    assert train_here(tmp_path, *SHOWN) == 0
    require_equal(tmp_path / "tiny", shown)


@pytest.mark.slow
def test_a_signal_during_a_preview_saves_that_step_and_the_picture_comes_later(
    tmp_path, monkeypatch, capsys
):
    words = ("run.steps=4", "run.save_every=4", "preview.every=1", "preview.num=2")
    words += ("preview.steps=2",)

    def told(previewer, nets, step, *rest):
        if step == 2:
            raise Stopped
        return write(previewer, nets, step, *rest)

    write = Previewer.write
    monkeypatch.setattr(Previewer, "write", told)
    assert train_here(tmp_path, *words) == 0
    assert "told to stop at step 2" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "tiny" / "checkpoints").iterdir()] == ["0000002"]
    monkeypatch.undo()
    assert train_here(tmp_path, *words) == 0
    assert len(pictures(tmp_path / "tiny")) == 12


@pytest.mark.slow
def test_resume_from_a_path_works_again_after_a_kill(uninterrupted, tmp_path, capsys):
    """The run then goes on from its own checkpoint, even if the path is gone by now; and each
    config that was in use is kept."""
    origin = tmp_path / "origin" / "0000002"
    shutil.copytree(uninterrupted / "checkpoints" / "0000002", origin)
    words = (*EPOCHS, f"run.resume={origin}")
    run = tmp_path / "tiny"
    for steps in (4, 5, 6):
        assert train_here(tmp_path, *words, f"run.steps={steps}") == 0
        start = origin if steps == 4 else run / "checkpoints" / f"{steps - 1:07d}"
        assert f"going on from {start}\n" in capsys.readouterr().out
        shutil.rmtree(origin, ignore_errors=True)
    assert contents(run, 6) == contents(uninterrupted, 6)
    assert {p.name for p in run.glob("config*")} == {
        "config.yaml", "config.0000004.yaml", "config.0000005.yaml"
    }  # fmt: skip


@pytest.mark.slow
def test_a_start_that_left_no_checkpoint_is_not_where_the_run_began(
    uninterrupted, tmp_path, capsys
):
    """Killed before its first save, and then begun anew: the run does not descend from the path."""
    origin = uninterrupted / "checkpoints" / "0000002"

    def killed(*_, **__):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(periodic.PeriodicTasks, "save", killed)
        with pytest.raises(Killed):
            train_here(tmp_path, *EPOCHS, f"run.resume={origin}")
    assert train_here(tmp_path, *EPOCHS, "run.steps=2") == 0
    assert (tmp_path / "tiny" / "config.unused.yaml").is_file()
    assert train_here(tmp_path, *EPOCHS, f"run.resume={origin}") == 2
    assert "holds 0000002 too" in capsys.readouterr().err


@pytest.mark.slow
def test_init_from_works_again_after_a_kill(uninterrupted, tmp_path):
    origin = tmp_path / "origin" / "0000002"
    shutil.copytree(uninterrupted / "checkpoints" / "0000002", origin)
    words = (*EPOCHS, f"run.init_from={origin}")
    assert train_here(tmp_path, *words, "run.steps=2") == 0
    shutil.rmtree(origin)
    assert train_here(tmp_path, *words, "run.steps=4") == 0
    assert (tmp_path / "tiny" / "checkpoints" / "0000004").is_dir()


def test_a_kept_config_is_never_overwritten(tmp_path):
    """Several changes without a new checkpoint."""
    for seed in (1, 2, 3, 3):
        tracking._record(tiny_config(f"run.out={tmp_path}", f"run.seed={seed}"), first=4)
    run = tmp_path / "tiny"
    kept = ["config.0000004.yaml", "config.0000004-2.yaml", "config.yaml"]
    assert sorted(p.name for p in run.iterdir()) == sorted(kept)
    assert [read_saved_config(run / name).run.seed for name in kept] == [1, 2, 3]


@pytest.mark.slow
def test_pictures_of_an_earlier_pass_are_not_taken_for_those_of_this_one(tmp_path, monkeypatch):
    """The newest checkpoint is damaged, the learning rate is another one, and a kill comes between
    the second checkpoint of that step and its pictures."""
    words = ("run.steps=4", "preview.every=4", "preview.num=2", "preview.steps=2")
    run = tmp_path / "tiny"
    assert train_here(tmp_path, *words) == 0
    before = pictures(run)
    (run / "checkpoints" / "0000004" / "state.json").unlink()
    (run / "samples" / "mine.png").touch()
    words += ("vae.optim.lr=1e-2",)

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Previewer, "write", killed)
        with pytest.raises(Killed):
            train_here(tmp_path, *words)
    assert train_here(tmp_path, *words) == 0
    assert {*pictures(run)} == {*before, "mine.png"}
    assert all(pictures(run)[name] != before[name] for name in before)
