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


def test_the_script_on_two_ranks_logs_saves_and_resumes(tmp_path):
    """And a checkpoint of two ranks is one that a single process goes on from."""
    done = train(tmp_path, "run.steps=2", "preview.every=2", "preview.num=8", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
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
