"""The prediction of a run: what it must hold, how it follows from settings, and the counts of the
published recipes beside those of an independent count.

python -m pytest tests/utils/cost/test_prediction.py        (CPU; fake tensors, no GPU needed)
"""

import json

import pytest

import train_repae
from models.checks.errors import UserError
from tests.tiny import ROOT, tiny_config
from utils.config.load import load_config
from utils.cost.devices import DEVICES, GIB
from utils.cost.fake_run import FakeRun
from utils.cost.memory import RESERVE, estimate
from utils.cost.operations import Operation
from utils.cost.prediction import predict
from utils.cost.roofline import LAUNCH, Rates, seconds
from utils.cost.settings import Estimates, predict_cheapest
from utils.training.networks import skeleton

FIXED = {"images_per_second", "images_per_second_fused", "peak_memory_gib", "gflop_per_image"}
FIXED |= {"kernels_per_step", "host_syncs_per_step", "phases"}
JOINT = ["encoder", "vae_forward", "reconstruction_losses", "alignment", "vae_backward"]
JOINT += ["discriminator", "sit", "optimizer"]


def predicted(*overrides: str, **kwargs) -> dict:
    return predict(tiny_config(*overrides), train_step=train_repae.train_step, **kwargs)


@pytest.fixture(scope="module")
def plain() -> dict:
    return predicted("run.precision=bf16")


def test_a_prediction_has_the_fixed_fields_and_is_json(plain):
    assert plain.keys() >= FIXED and json.loads(json.dumps(plain)) == plain
    assert [name for name in plain["phases"] if name != "other"] == JOINT
    assert plain["predicted"] and "H100" in plain["device"]


def test_phases_add_up_to_the_step(plain):
    phases = plain["phases"].values()
    assert sum(p["share"] for p in phases) == pytest.approx(1)
    step = sum(p["ms_per_image"] for p in phases)
    assert plain["images_per_second"] == pytest.approx(1000 / step)
    assert sum(p["kernels"] for p in phases) == plain["kernels_per_step"]
    bounds = ("images_per_second", "images_per_second_fused", "images_per_second_fused_ideal")
    assert sorted(plain[b] for b in bounds) == [plain[b] for b in bounds]


def test_the_step_does_not_wait_and_copies_no_layouts(plain):
    assert plain["host_syncs_per_step"] == 0
    assert plain["layout_copy_share"] < 0.01


@pytest.mark.slow
def test_the_memory_is_that_of_the_estimate(plain):
    c = tiny_config("run.precision=bf16")
    found = estimate(c, skeleton(c, 1000), train_repae.train_step)
    assert plain["peak_memory_gib"] * GIB == pytest.approx(found.peak(8) + RESERVE, rel=1e-4)


def test_hours_are_those_of_all_steps_on_all_ranks(plain):
    one = plain["hours"] * 3600 / 4  # of 4 steps
    assert one == pytest.approx(8 / plain["images_per_second"])
    two = predicted("run.precision=bf16", "run.batch_size=16", ranks=2, steps=100)
    assert two["images_per_second"] == pytest.approx(plain["images_per_second"], rel=1e-6)
    assert two["hours"] == pytest.approx(25 * plain["hours"])
    assert two["gpu_hours"] == pytest.approx(2 * two["hours"])
    assert two["images_per_second_all_ranks"] == pytest.approx(2 * two["images_per_second"])
    assert two["days_to_80_epochs"] == pytest.approx(plain["days_to_80_epochs"] / 2)


@pytest.mark.slow
def test_micro_batches_do_the_same_arithmetic_with_more_kernels(plain):
    four = predicted("run.precision=bf16", "run.accumulation=4")
    assert four["gflop_per_image"] == pytest.approx(plain["gflop_per_image"])
    # each of the later ones adds to every gradient
    assert 3 < four["kernels_per_step"] / plain["kernels_per_step"] < 5
    assert four["peak_memory_gib"] < plain["peak_memory_gib"]


@pytest.mark.slow
def test_an_assumed_third_micro_batch_is_a_true_one():
    """Two of four are counted, beside all four."""
    settings = ("run.precision=bf16", "run.batch_size=8", "run.accumulation=4")
    c, found = tiny_config(*settings), predicted(*settings)
    counter = FakeRun(c, skeleton(c, 1000)).step(train_repae.train_step, 8, accumulation=4)
    kernels, moved = (sum(getattr(e.op, k) for e in counter.counted) for k in ("kernels", "bytes"))
    assert found["kernels_per_step"] == pytest.approx(kernels, rel=0.01)
    assert found["mb_per_image"] * 8e6 == pytest.approx(moved, rel=0.01)


KINDS = [
    "run.precision=fp16 run.checkpointing=both",
    "run.precision=fp32 run.tf32=false run.compile=true",
    "run.precision=bf16 vae.train=false vae.weights=hub",
    "run.precision=bf16 run.on_nonfinite=skip run.shard_optimizer=true loss.reg.lpips=1 "
    "run.lpips_precision=fp16",
]


@pytest.mark.slow
@pytest.mark.parametrize("change", KINDS)
def test_every_kind_of_run_is_predicted(change):
    found = predicted(*change.split(), ranks=2)
    assert found["images_per_second"] > 0 and found["host_syncs_per_step"] == 0
    half = found["gflop_per_image_half"]
    assert (half == 0) == ("fp32" in change)


def test_an_unknown_device_is_the_users_mistake():
    with pytest.raises(UserError, match="V100"):
        predicted(device="V100")


# --------------------------------------------------------------------------------------
# From counts to seconds.


def test_the_roofline_by_hand():
    rates = Rates(half=100e12, float32=50e12, bandwidth=1e12)
    flops = Operation("mm", "matrix", flops=10**11, half=True, read=10**6, kernels=1)
    moved = Operation(
        "add", "pointwise", read=3 * 10**9, written=10**9, largest=2 * 10**9, kernels=1
    )
    assert seconds([flops], rates) == pytest.approx(1e-3)
    assert seconds([moved], rates) == pytest.approx(4e-3)
    assert seconds([moved], rates, fused=True) == pytest.approx(1e-3)
    tiny = [Operation("add", "pointwise", read=8, written=8, kernels=1)] * 100
    assert seconds(tiny, rates) == pytest.approx(100 * LAUNCH)
    assert seconds(tiny, rates, fused=True) == pytest.approx(0, abs=1e-9)


def test_float32_takes_tf32_only_where_it_is_allowed():
    h100 = DEVICES["h100"]
    assert Rates.of(h100, tf32=True, ideal=True).float32 == h100.tf32
    assert Rates.of(h100, tf32=False, ideal=True).float32 == h100.fp32


# --------------------------------------------------------------------------------------
# The cheapest settings.


@pytest.mark.slow
def test_settings_that_fit_checkpoint_first_and_split_the_batch_last():
    c = tiny_config("run.precision=bf16", "run.batch_size=64")
    estimates = Estimates(c, skeleton(c, 10), train_repae.train_step, 1)
    need = {kind: estimates.of(kind).peak(64) + RESERVE for kind in estimates.kinds()}
    assert need["none"] > need["both"] == min(need.values())
    for limit in need.values():
        kind = next(kind for kind in need if need[kind] <= limit)
        best = estimates.cheapest(64, limit)
        assert (best.checkpointing, best.accumulation, best.need) == (kind, 1, need[kind])
    less = estimates.cheapest(64, need["both"] - 1)
    assert less.accumulation == 2 and estimates.cheapest(64, RESERVE) is None
    frozen = tiny_config("vae.train=false", "vae.weights=hub")
    kinds = Estimates(frozen, skeleton(frozen, 10), train_repae.train_step, 1).kinds()
    assert list(kinds) == ["none", "sit"]


@pytest.mark.slow
def test_the_prediction_with_them_is_that_of_the_run_that_has_them(plain):
    c = tiny_config("run.precision=bf16")
    estimates = Estimates(c, skeleton(c, 1000), train_repae.train_step, 1)
    found = predict_cheapest(estimates, DEVICES["h100"], 1)
    assert found["settings"] == "run.checkpointing=none run.accumulation=1"
    for name in ("images_per_second", "peak_memory_gib", "gflop_per_image", "kernels_per_step"):
        assert found[name] == pytest.approx(plain[name], rel=1e-3)


# --------------------------------------------------------------------------------------
# The published recipes.

# GFLOP of an image in half precision and in TF32: counted independently from the reference's
# modules and ours (the step of 32 images, bf16)
RECIPES = {"repae-sdvae-xl2": (3609, 170), "repae-invae-xl1": (2093, 170)}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_published_recipes_agree_with_an_independent_count(name):
    c = load_config([ROOT / f"configs/imagenet256/{name}.yaml"], ["run.checkpointing=none"])
    found = predict(c, "h100", 8, train_repae.train_step)
    half, float32 = RECIPES[name]
    assert found["gflop_per_image_half"] == pytest.approx(half, rel=0.02)
    assert found["gflop_per_image_float32"] == pytest.approx(float32, rel=0.02)
    assert found["host_syncs_per_step"] == 0 and found["layout_copy_share"] < 0.01
