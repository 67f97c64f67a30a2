"""The latent norm: its inverse, torch's BatchNorm2d on one rank, two ranks on a joint batch.

Run with STORE OUT as arguments this file is the second rank.
"""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from models.latent_norm import JointBatchNorm2d, LatentNorm

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------
# One process


@pytest.mark.parametrize("var", [1e-6, 1e-4, 1e-2, 1.0, 1e3])
def test_inverse_is_exact_at_any_variance(var):
    """The same eps both ways: at variance 1e-6 without it the error would be a factor of 10."""
    norm = LatentNorm(4)
    norm.set_stats(torch.tensor([0.0, 1.0, -2.0, 30.0]), torch.full((4,), var).sqrt())
    norm.eval()
    z = norm.running_mean[:, None, None] + var**0.5 * torch.randn(8, 4, 6, 6)
    assert torch.allclose(norm.inverse(norm(z)), z, rtol=1e-6, atol=4e-6 * var**0.5)
    exact = norm.double()
    z_n = torch.randn(8, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(exact(exact.inverse(z_n)), z_n, rtol=1e-10, atol=1e-10)


def test_train_mode_is_batch_norm_with_eps_1e4_and_momentum_a_tenth():
    """Outputs, input gradients and running statistics of torch's own, over three batches."""
    ours, theirs = LatentNorm(4), nn.BatchNorm2d(4, eps=1e-4, momentum=0.1, affine=False)
    for step in range(3):
        x = (0.01 * torch.randn(8, 4, 6, 6) + step).requires_grad_()
        x2 = x.detach().clone().requires_grad_()
        ours(x).pow(3).sum().backward()
        theirs(x2).pow(3).sum().backward()
        assert torch.equal(ours(x), theirs(x2))
        assert torch.equal(x.grad, x2.grad)
        for key, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[key], value), key
    assert ours.num_batches_tracked == 6
    assert torch.equal(ours.eval()(x), theirs.eval()(x2))


def test_train_mode_formula_written_out():
    """Batch moments with the biased variance normalise; the unbiased one moves the running one."""
    norm, x = LatentNorm(3).double(), 5 + 2 * torch.randn(4, 3, 5, 5, dtype=torch.float64)
    values = x.transpose(0, 1).reshape(3, -1)
    mean, num = values.mean(dim=1), values.shape[1]
    biased = (values - mean[:, None]).square().sum(dim=1) / num
    expected = (x - mean[:, None, None]) / (biased + 1e-4).sqrt()[:, None, None]
    assert torch.allclose(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(norm.running_mean, 0.1 * mean, rtol=1e-12)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * biased * num / (num - 1), rtol=1e-12)


def test_no_affine_part_and_the_published_buffers():
    norm = LatentNorm(4)
    assert not list(norm.parameters())
    assert set(norm.state_dict()) == {"running_mean", "running_var", "num_batches_tracked"}


def test_eval_mode_uses_and_keeps_the_running_statistics():
    norm = LatentNorm(2).eval()
    norm.set_stats(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5]))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    z = 10 * torch.randn(4, 2, 3, 3)
    mean, std = torch.tensor([1.0, -1.0]), (torch.tensor([4.0, 0.25]) + 1e-4).sqrt()
    expected = (z - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(norm(z), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(norm.state_dict()[k], v) for k, v in before.items())


def test_fixed_never_moves_and_ignores_train_mode():
    norm = LatentNorm(2, fixed=True)
    norm.set_stats(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5]))
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    z = 10 * torch.randn(4, 2, 3, 3)
    expected = norm.eval()(z)
    assert torch.equal(norm.train()(z), expected)
    assert torch.equal(nn.Sequential(norm).train()(z), expected)  # through a parent as well
    assert not norm.training
    assert all(torch.equal(norm.state_dict()[k], v) for k, v in before.items())


def test_set_stats_and_stats():
    """`set_stats` takes the latents' mean and std; `stats` gives what (z - mean) / std needs."""
    norm = LatentNorm(3)
    given_mean, given_std = torch.randn(3), torch.rand(3) + 0.1
    norm.set_stats(given_mean, given_std)
    assert torch.equal(norm.running_mean, given_mean)
    assert torch.allclose(norm.running_var, given_std**2, rtol=1e-6)
    mean, std = norm.stats()
    z = torch.randn(4, 3, 5, 5)
    expected = (z - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(norm.eval()(z), expected, rtol=1e-5, atol=1e-6)


def test_eps_would_show_at_tiny_variance():
    """The inverse test can fail: inverted without eps (the reference's fault) z is lost."""
    norm = LatentNorm(1).eval()
    norm.set_stats(torch.zeros(1), torch.full((1,), 1e-3))
    z = 1e-3 * torch.randn(8, 1, 4, 4)
    assert (norm(z) * norm.running_var.sqrt() - z).norm() > 0.5 * z.norm()


# --------------------------------------------------------------------------------------
# Two ranks


def build(case):
    """(the norm, its inputs for two steps over the joint batch, the weights of the loss)"""
    g = torch.Generator().manual_seed(7)
    dtype = torch.float32 if "float32" in case else torch.float64
    channels = 3
    norm = JointBatchNorm2d(channels) if "affine" in case else LatentNorm(channels)
    norm = norm.to(dtype)
    if "affine" in case:
        with torch.no_grad():
            norm.weight.copy_(torch.rand(channels, generator=g) + 0.5)
            norm.bias.copy_(torch.randn(channels, generator=g))
    if "eval" in case:
        norm.eval()
    shape = (2, 6, channels, 4, 4)  # steps, images of both ranks, ...
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    # ranks differ in level and spread, so that local moments are not the joint ones
    x[:, 3:] = 5 * x[:, 3:] + 2
    if "small variance" in case:  # beside its mean: sums of squares would cancel in float32
        x = 100 + 0.01 * x
    weights = torch.randn(shape, generator=g, dtype=torch.float64)
    return norm, x.to(dtype), weights.to(dtype)


CASES = [
    "latent",
    "affine",
    "latent, eval",
    "latent, float32",
    "affine, float32",
    "latent, float32, small variance",
]


def run_case(case, images):
    """Two steps on a slice of the joint batch => everything that must not depend on the slicing."""
    norm, xs, weights = build(case)
    outputs, gradients = [], []
    for x, w in zip(xs[:, images], weights[:, images]):
        x = x.clone().requires_grad_()
        y = norm(x)
        (y.pow(2) * w).sum().backward()  # of all ranks together: the sum over the joint batch
        outputs.append(y.detach())
        gradients.append(x.grad)
    state = {k: v.clone() for k, v in norm.state_dict().items()}
    affine = {name: p.grad for name, p in norm.named_parameters()}
    return {
        "y": torch.stack(outputs),
        "dx": torch.stack(gradients),
        "state": state,
        "affine": affine,
    }


def run_rank(rank, store):
    """The results of one of two ranks."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    try:
        half = slice(3 * rank, 3 * rank + 3)
        return {case: run_case(case, half) for case in CASES}
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Rank 0 is this process, rank 1 another one."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(folder / "store"), str(folder / "1.pt")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen(command, env=env)
    here = run_rank(0, folder / "store")
    assert other.wait(timeout=120) == 0
    return [here, torch.load(folder / "1.pt", weights_only=True)]


@pytest.fixture(params=CASES)
def case_joint_ranks(request, two_ranks):
    """A case, its results in this process on the joint batch, and those of the two ranks."""
    case = request.param
    return case, run_case(case, slice(None)), [rank[case] for rank in two_ranks]


def near(a, b, case):
    tolerance = 1e-11
    if "float32" in case:
        # a value 100 with std 0.01 has itself only 3 digits left in float32
        tolerance = 2e-2 if "small variance" in case else 1e-5
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_two_ranks_give_the_outputs_of_one_process_on_the_joint_batch(case_joint_ranks):
    case, joint, ranks = case_joint_ranks
    assert near(torch.cat([r["y"] for r in ranks], dim=1), joint["y"], case)


def test_two_ranks_give_the_input_gradients_of_one_process(case_joint_ranks):
    """Through the joint moments: a loss of one rank moves the inputs of the other."""
    case, joint, ranks = case_joint_ranks
    scale = joint["dx"].abs().max()
    assert near(torch.cat([r["dx"] for r in ranks], dim=1) / scale, joint["dx"] / scale, case)


def test_two_ranks_hold_the_running_statistics_of_one_process(case_joint_ranks):
    case, joint, ranks = case_joint_ranks
    for key, value in joint["state"].items():
        assert torch.equal(ranks[0]["state"][key], ranks[1]["state"][key]), key
        assert ranks[0]["state"][key].dtype == value.dtype
        scale = 1e-4 if "small variance" in case and key == "running_var" else 1
        assert near(ranks[0]["state"][key] / scale, value / scale, case), key
    tracked = ranks[0]["state"]["num_batches_tracked"]
    assert tracked == (0 if "eval" in case else 2)


def test_affine_gradients_add_up_to_those_of_one_process(case_joint_ranks):
    case, joint, ranks = case_joint_ranks
    assert set(joint["affine"]) == ({"weight", "bias"} if "affine" in case else set())
    for name, gradient in joint["affine"].items():
        total = ranks[0]["affine"][name] + ranks[1]["affine"][name]
        assert near(total / gradient.abs().max(), gradient / gradient.abs().max(), case), name


def test_local_moments_would_show():
    """The tests above can fail: half of the batch alone has other moments and gradients."""
    whole, half = run_case("latent", slice(None)), run_case("latent", slice(0, 3))
    assert (half["y"] - whole["y"][:, :3]).abs().max() > 0.1
    assert (half["dx"] - whole["dx"][:, :3]).abs().max() > 0.1


if __name__ == "__main__":
    torch.save(run_rank(1, sys.argv[1]), sys.argv[2])
