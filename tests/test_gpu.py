"""What only a CUDA device can show: precision, waits, compiled code, memory, ranks over NCCL.

python -m pytest tests/test_gpu.py -m gpu        (skipped, and listed, without a GPU)
"""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from torch._dynamo import config as dynamo

import train_repae
from scripts import cache_latents
from tests.tiny import ROOT, TINY, batch, launcher, run_here, start, tiny_config, train_here
from utils import distributed
from utils.benchmark import machine
from utils.benchmark.clock import DATA, OTHER, PhaseClock
from utils.benchmark.training import Training
from utils.config.load import load_config
from utils.cost.prediction import predict
from utils.data.latents import LATENTS, LatentCache
from utils.precision import allow_tf32
from utils.sampling.images import draw_images
from utils.sampling.noise import ImageNoise
from utils.sampling.settings import SamplingSettings
from utils.training.draws import Draws
from utils.training.networks import Networks
from utils.training.phases import PHASES, observed, phase
from utils.training.tracking import read_metrics

pytestmark = pytest.mark.gpu

COMPILED = "run.compile=true"
DEVICE = distributed.default_device()  # a GPU: elsewhere these tests are skipped


def step(nets: Networks, config, number: int = 0) -> dict[str, float]:
    """The metrics of one step on digits."""
    device = nets.sit.device
    x, y, draws = batch(config, number)
    draws = Draws(*(getattr(draws, f.name).to(device) for f in fields(draws)))
    on_device = (x.to(device), y.to(device), draws)
    metrics = train_repae.train_step(nets, *on_device, config, number)
    return {name: value.item() for name, value in metrics.items()}


def prepared(*overrides: str) -> Training:
    """Training on noise, as the benchmark has it: batches in pinned memory, draws on the device."""
    config = tiny_config(*overrides)
    accelerator = distributed.start(config.run_dir, [], tf32=config.run.tf32)
    return Training(config, accelerator, train_repae.train_step, real_data=False)


def take(training: Training, steps: int) -> list[dict[str, float]]:
    """Milliseconds of the phases of so many steps."""
    clock = PhaseClock(training.device)
    for _ in range(steps):
        training.step(clock)
    return clock.read()


# --------------------------------------------------------------------------------------
# Precision.


@pytest.mark.parametrize("change", ["", "run.channels_last=true", COMPILED])
def test_a_step_in_bf16_is_that_in_float32_up_to_its_rounding(change):
    exact = tiny_config("run.tf32=false", "run.channels_last=false")
    rounded = tiny_config("run.precision=bf16", *change.split())
    expected, found = (step(start(config)[0], config) for config in (exact, rounded))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if name.startswith("loss/"):
            assert value == pytest.approx(expected[name], rel=0.05, abs=0.02), name


def test_an_overflow_in_fp16_leaves_out_one_update_and_lowers_the_scale():
    config = tiny_config("run.precision=fp16")
    nets, _ = start(config)
    step(nets, config)
    trained = nets.trained["sit"]
    assert trained.skipped is not None
    trained.skipped.counts.zero_()
    trained.scaler.update(2.0**100)  # beyond what gradients of half precision can hold
    before = [p.clone() for p in trained.params]
    step(nets, config, 1)
    assert all(torch.equal(p, old) for p, old in zip(trained.params, before))
    assert trained.scaler.get_scale() < 2.0**100
    assert trained.skipped.counts.tolist() == [1, 1, 1]
    trained.scaler.update(2.0**10)
    step(nets, config, 2)
    assert not all(torch.equal(p, old) for p, old in zip(trained.params, before))
    assert trained.skipped.counts.tolist() == [1, 0, 1]


def test_a_frozen_vae_gives_the_latents_of_the_cache(tmp_path, monkeypatch):
    assert train_here(tmp_path, "run.steps=1", "run.tf32=true") == 0
    vae, cache = tmp_path / "tiny" / "checkpoints" / "0000001" / "vae", tmp_path / "cache"
    data = ("--data", "digits", "--resolution", "16", "--workers", "0")
    words = ("cache_latents.py", "--vae", vae, *data, "--out", cache)
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    cache_latents.main()
    frozen = tiny_config("vae.train=false", f"vae.name={vae}", "vae.weights=hub")
    nets, _ = start(frozen)
    allow_tf32(True)  # as the script does
    x = batch(frozen)[0].to(nets.sit.device)
    with torch.no_grad():
        posterior = nets.vae.encode(x)
    stored = LatentCache(cache)
    for i, (mean, std) in enumerate(zip(posterior.mean.cpu(), posterior.std.cpu())):
        expected = stored.read(LATENTS, i)[0].float()
        torch.testing.assert_close(torch.stack([mean, std]), expected, rtol=2e-3, atol=2e-3)


def test_the_noise_of_an_image_is_the_same_in_every_batch():
    """Bit by bit; and that of the CPU, but for the last bits."""
    shares = (range(3), range(3, 8))
    whole, parts = ImageNoise(5, range(8), DEVICE), [ImageNoise(5, i, DEVICE) for i in shares]
    first = whole.start(4, 8, 8)
    assert torch.equal(first, torch.cat([part.start(4, 8, 8) for part in parts]))
    for draw in (1, 2, 3, 9):
        drawn = [part(z, draw) for part, z in zip(parts, first.split([3, 5]))]
        assert torch.equal(whole(first, draw), torch.cat(drawn))
    on_cpu = ImageNoise(5, range(8), "cpu").start(4, 8, 8)
    torch.testing.assert_close(first.cpu(), on_cpu, rtol=0, atol=1e-6)


def test_an_image_is_the_same_in_every_batch_up_to_rounding():
    """Of sums in another order: one grey level."""
    nets, _ = start(tiny_config("run.tf32=false"))
    how = SamplingSettings(steps=5, precision="fp32")
    one, two = (
        draw_images(replace(how, batch_size=n), nets.ema, nets.vae, range(8), DEVICE)
        for n in (8, 3)
    )
    assert (one.int() - two.int()).abs().max() <= 1


# --------------------------------------------------------------------------------------
# Time.


@pytest.mark.parametrize(
    "change", ["", "run.accumulation=2", COMPILED, "vae.train=false", "run.on_nonfinite=skip"]
)
def test_nothing_in_a_step_waits_for_the_device(change):
    """From a batch in pinned memory to the metrics, the random numbers included."""
    training = prepared("run.precision=bf16", *change.split())
    take(training, 3)  # first calls choose algorithms, and compile
    clock = PhaseClock(training.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            training.step(clock)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_phase_has_the_time_of_its_own_kernels():
    """The host is done with a phase long before the device is."""
    clock, a = PhaseClock(DEVICE), torch.randn(4096, 4096, device=DEVICE)
    for _ in range(3):
        with clock.step(), observed(clock):
            with phase("encoder"):
                a[:8].sum()
            with phase("sit"):
                for _ in range(20):
                    torch.mm(a, a)
    *_, last = clock.read()
    assert last["sit"] > 20 * last["encoder"]


@pytest.mark.parametrize("change", [COMPILED, "run.compile=true run.compile_mode=reduce-overhead"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_nothing_is_compiled_again_after_the_first_steps(change, accumulation):
    training = prepared("run.precision=bf16", *change.split(), f"run.accumulation={accumulation}")
    take(training, 2)
    with dynamo.patch(error_on_recompile=True):
        metrics = [training.step(PhaseClock(training.device)) for _ in range(5)]
    assert all(value.isfinite() for value in metrics[-1].values())


def test_the_benchmark_reads_the_clock_and_the_memory_of_the_device(tmp_path):
    out, trace = tmp_path / "a.json", tmp_path / "trace.json"
    words = (*TINY, "run.precision=bf16", "--steps", 5, "--json", out, "--trace", trace)
    assert run_here("scripts/benchmark.py", *words) == 0
    found = json.loads(out.read_text())
    assert found["device"] == torch.cuda.get_device_name()
    assert list(found["phases"]) == [DATA, *PHASES, OTHER]
    assert 0 < found["peak_memory_gib"] <= found["peak_memory_reserved_gib"]
    assert {"bf16", "tf32", "fp32"} == set(found["matmul_tflops"])
    kinds = {event.get("cat") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "kernel" in kinds


@pytest.mark.parametrize("change", ["run.batch_size=8", "run.batch_size=4 run.checkpointing=both"])
def test_the_peak_of_the_memory_is_the_predicted_one(change):
    """Without what is set aside for all that is no tensor."""
    small = [*change.split(), "run.compile=false", "run.accumulation=1"]
    config = load_config([ROOT / "configs" / "ablations" / "repae-sdvae-b2.yaml"], small)
    expected = predict(config, "h100", train_step=train_repae.train_step)
    accelerator = distributed.start(config.run_dir, [], tf32=True)
    training = Training(config, accelerator, train_repae.train_step, real_data=False)
    take(training, 2)
    machine.forget_peak(DEVICE)
    take(training, 2)
    measured = machine.peak_memory(DEVICE)["peak_memory_gib"]
    tensors = expected["peak_memory_gib"] - expected["memory_reserve_gib"]
    assert measured == pytest.approx(tensors, rel=0.1)


# --------------------------------------------------------------------------------------
# Whole runs.


@pytest.mark.parametrize(
    "change",
    ["run.precision=bf16", "run.precision=fp16 run.accumulation=2 run.compile=true"],
)
def test_twenty_steps_of_joint_training_on_digits(tmp_path, change):
    words = ["run.steps=20", "run.log_every=5", "run.save_every=20", "run.batch_size=64"]
    assert train_here(tmp_path, *words, "preview.every=20", "preview.num=8", *change.split()) == 0
    rows = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[-1]["loss/vae/pixel"] < 0.7 * rows[0]["loss/vae/pixel"]
    assert rows[-1]["loss/vae/align"] < rows[0]["loss/vae/align"]
    assert rows[-1]["peak_memory_gib"] > 0
    assert (tmp_path / "tiny" / "samples" / "0000020.png").is_file()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("change", ["", COMPILED])
def test_two_ranks_over_nccl_train_save_and_are_measured(tmp_path, change):
    def run(*command) -> None:
        words = [sys.executable, *launcher(2), *map(str, command)]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]

    words = (*TINY, "run.precision=bf16", *change.split())
    run("train_repae.py", *words, f"run.out={tmp_path}")
    rows = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    run("scripts/benchmark.py", *words, "--steps", 3, "--json", tmp_path / "two.json")
    assert json.loads((tmp_path / "two.json").read_text())["ranks"] == 2
