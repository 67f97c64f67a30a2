"""Two gloo ranks against one process on the joint batch, through `accelerate launch`.

python -m pytest tests/test_ddp.py
"""

import json

import pytest
import torch

from tests import two_ranks
from tests.test_step import relative
from tests.tiny import run_script, train, train_here
from utils.checkpoint import find_fault
from utils.training.tracking import read_metrics

# AdamW's eps is raised: its first steps are otherwise the sign of each gradient, rounding included.
VARIANTS = {
    "joint": (),
    "accumulation": ("run.accumulation=2", "disc.norm=group", "disc.channels=16"),
    "naive": ("loss.diffusion.to_vae=true",),
}


def steps(out, ranks: int, *overrides: str) -> list[dict]:
    out.mkdir()
    if ranks == 1:
        two_ranks.main(out, *overrides)
    else:
        done = run_script("tests/two_ranks.py", out, *overrides, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(out / f"rank{r}.pt", weights_only=True) for r in range(ranks)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "variant",
    ["joint", pytest.param("accumulation", marks=SLOW), pytest.param("naive", marks=SLOW)],
)
def test_two_ranks_equal_one_process_on_the_joint_batch(tmp_path, variant):
    """After 3 steps: gradients of all three networks, weights, latent-norm statistics, EMA."""
    extra = (*VARIANTS[variant], "vae.optim.eps=1e-4", "sit.optim.eps=1e-4", "disc.optim.eps=1e-4")
    (one,) = steps(tmp_path / "one", 1, *extra)
    first, second = steps(tmp_path / "two", 2, *extra)
    for net in ("vae", "sit", "disc"):
        ours, theirs = (
            {k: v for k, v in run["grads"].items() if k.startswith(net) and v is not None}
            for run in (first, one)
        )
        assert relative(ours, theirs) < 1e-3, net
    for name, value in one["state"].items():
        assert torch.allclose(first["state"][name], value, rtol=1e-3, atol=1e-4), name
    for name in ("sit.bn.running_mean", "sit.bn.running_var", "sit.pos_embed"):
        assert torch.allclose(first["state"][name], one["state"][name], atol=1e-5), name
    different = [k for k, v in first["state"].items() if not torch.equal(v, second["state"][k])]
    assert different == []  # position embedding and every buffer included


@pytest.mark.slow
def test_the_script_on_two_ranks_logs_saves_and_resumes(tmp_path):
    """And a checkpoint of two ranks is one that a single process goes on from."""
    done = train(tmp_path, "run.steps=2", "preview.every=2", "preview.num=8", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr[-2000:]
    run = tmp_path / "tiny"
    assert find_fault(run / "checkpoints" / "0000002") is None
    state = json.loads((run / "checkpoints" / "0000002" / "state.json").read_text())
    assert state["ranks"] == 2
    assert (run / "samples" / "0000002.png").is_file()
    (row,) = read_metrics(run / "metrics.jsonl")
    assert row["step"] == 2 and row["images_per_second"] > 0
    assert train_here(tmp_path, "run.steps=4") == 0
    assert find_fault(run / "checkpoints" / "0000004") is None


@pytest.mark.slow
def test_a_batch_that_does_not_split_is_one_line_and_exit_code_2(tmp_path):
    done = train(tmp_path, "run.batch_size=7", ranks=2)
    assert done.returncode != 0
    message = "error: run.batch_size=7 does not split into 2 ranks x 1 micro-batches"
    assert message in done.stderr


@pytest.mark.slow
def test_shared_out_optimizers_and_ema_change_no_bit(tmp_path):
    """Of weights, EMA, metrics, loss scales and moments, with and without loss scale, guard and
    clipping in the kernel; each rank keeps its share alone (tests/sharded_ranks.py)."""
    done = run_script("tests/sharded_ranks.py", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("equal") == 2


def files_of(run, step: int) -> dict[str, bytes]:
    """A checkpoint byte for byte, but for state.json, which names the settings."""
    folder = run / "checkpoints" / f"{step:07d}"
    assert find_fault(folder) is None
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != "state.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.mark.slow
def test_checkpoints_do_not_show_whether_state_is_shared_out(tmp_path, capsys):
    """Byte for byte those of whole state, pictures too; a run goes on from the one with the other,
    after a stop between, and with another number of ranks."""
    words = ("run.save_every=1", "run.keep_last=9", "preview.every=2", "preview.num=2")
    words += ("preview.steps=2", "eval.every=2", "eval.num=24", "eval.steps=2", "data.split=test")
    words += ("eval.features=pixel", "eval.metrics=[fid]", "eval.batch_size=24")
    whole, shared = tmp_path / "whole" / "tiny", tmp_path / "shared" / "tiny"
    done = train(tmp_path / "whole", *words, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for steps, shard in ((2, "true"), (3, "false"), (4, "true")):
        extra = (f"run.steps={steps}", f"run.shard_optimizer={shard}")
        done = train(tmp_path / "shared", *words, *extra, ranks=2)
        assert done.returncode == 0, done.stderr[-2000:]
    for step in (2, 3, 4):
        assert files_of(shared, step) == files_of(whole, step)
    pictures = [{p.name: p.read_bytes() for p in run.glob("samples/*")} for run in (whole, shared)]
    assert len(pictures[0]) == 6 and pictures[0].items() <= pictures[1].items()
    rows = [read_metrics(run / "metrics.jsonl") for run in (whole, shared)]
    values = [[{k: v for k, v in row.items() if k[:5] == "eval/"} for row in r] for r in rows]
    assert any(values[0]) and list(filter(None, values[0])) == list(filter(None, values[1]))
    assert train_here(tmp_path / "shared", *words, "run.steps=5", "run.shard_optimizer=true") == 0
    assert "shard_optimizer changes nothing: a single process" in capsys.readouterr().out
    assert find_fault(shared / "checkpoints" / "0000005") is None
