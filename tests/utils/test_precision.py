"""TF32: one API sets it, both can be read. And bf16 on a CPU without it: fp32 is used, and said.

python -m pytest tests/utils/test_precision.py
"""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.vae import build_vae
from tests.tiny import run_here, start, tiny_config, train_here
from utils import precision
from utils.config.load import read_saved_config
from utils.doctor.machine import check_device
from utils.precision import allow_tf32, cpu_has, effective_precision, exact_float32
from utils.sampling.load import settings_for
from utils.sampling.settings import SamplingSettings
from utils.training.plan import changes_since, starting_point


def readings() -> tuple:
    """What readers of the older API see; after the newer one has set something, they raise."""
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )


@pytest.fixture
def _as_before():
    _, products, convolutions = readings()
    yield
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_can_be_read_by_both_apis_after_it_was_set_by_one(allowed):
    """torch.compile reads either, in places that differ from one torch to the next."""
    allow_tf32(allowed)
    assert readings() == ("high" if allowed else "highest", allowed, allowed)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.6 has the older API alone
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed
        convolutions: Any = torch.backends.cudnn
        assert (convolutions.conv.fp32_precision == "tf32") == allowed
    with exact_float32():
        assert readings() == ("highest", False, False)
    assert readings() == ("high" if allowed else "highest", allowed, allowed)


@pytest.mark.usefixtures("_as_before")
def test_what_torch_starts_with_comes_back_after_exact_float32_and_an_error():
    """TF32 in convolutions alone."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    with pytest.raises(ZeroDivisionError), exact_float32():
        _ = 1 / 0
    assert readings() == ("highest", False, True)


# --------------------------------------------------------------------------------------
# Formats that a CPU does not have.

CPU = torch.device("cpu")


@pytest.fixture
def no_halves(monkeypatch):
    """A CPU that multiplies in float32 alone."""
    monkeypatch.setattr(precision, "cpu_has", lambda name: name == "fp32")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx2", "fma"}, (False, False)),
        ({"avx512_f", "avx512f"}, (False, False)),
        ({"avx512_bf16"}, (True, False)),
        ({"amx_bf16", "amx_fp16"}, (True, True)),
        ({"svebf16", "asimdhp"}, (True, True)),
    ],
)
def test_a_cpu_has_what_its_features_say(features, expected, monkeypatch):
    monkeypatch.setattr(precision, "_cpu_features", lambda: features)
    assert (cpu_has.__wrapped__("bf16"), cpu_has.__wrapped__("fp16")) == expected
    assert cpu_has.__wrapped__("fp32")


def test_the_features_of_this_cpu_can_be_read():
    assert len(precision._cpu_features()) > 5


@pytest.mark.usefixtures("no_halves")
def test_only_a_cpu_computes_in_another_precision():
    for name in ("bf16", "fp16", "fp32"):
        assert effective_precision(name, "cuda") == name
        assert effective_precision(name, CPU) == "fp32"


@pytest.mark.usefixtures("no_halves")
def test_training_takes_fp32_and_says_so_once(capsys):
    nets, _ = start(tiny_config("run.precision=bf16"))
    assert nets.precision == "fp32"
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("run.precision=bf16: fp32 is used: this CPU has no native bf16") == 1
    nets, _ = start(tiny_config())
    assert "native" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_keeps_its_setting_and_goes_on_where_there_is_bf16(tmp_path, monkeypatch, capsys):
    """On the CPU without it, the run is that of run.precision=fp32, to the bit."""
    words = ("run.steps=2", "run.save_every=2")
    with monkeypatch.context() as patch:
        patch.setattr(precision, "cpu_has", lambda name: name == "fp32")
        assert train_here(tmp_path / "half", *words, "run.precision=bf16", "--dry-run") == 0
        assert "note: run.precision=bf16: fp32 is used" in capsys.readouterr().out
        assert train_here(tmp_path / "half", *words, "run.precision=bf16") == 0
    assert train_here(tmp_path / "single", *words) == 0
    files = [
        tmp_path / out / "tiny/checkpoints/0000002/sit/diffusion_pytorch_model.safetensors"
        for out in ("half", "single")
    ]
    half, single = map(load_file, files)
    assert all(half[name].equal(single[name]) for name in single)
    run = tmp_path / "half" / "tiny"
    assert read_saved_config(run / "config.yaml").run.precision == "bf16"
    config = tiny_config(f"run.out={tmp_path / 'half'}", "run.precision=bf16", *words)
    assert changes_since(config, starting_point(config), None) == []
    monkeypatch.setattr(precision, "cpu_has", lambda name: True)
    assert train_here(tmp_path / "half", "run.steps=3", "run.precision=bf16") == 0
    assert "native" not in capsys.readouterr().out.rsplit("going on", 1)[1]


@pytest.mark.usefixtures("no_halves")
def test_samples_are_recorded_with_the_precision_that_made_them(capsys):
    asked = SamplingSettings()
    assert asked.precision == "bf16"
    used = settings_for(CPU, asked)
    assert used.that_decide_pixels()["precision"] == "fp32"
    assert capsys.readouterr().out.count("\n") == 1
    assert settings_for(torch.device("cuda"), asked) == asked
    assert settings_for(CPU, used) == used and not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("no_halves")
def test_a_cache_is_recorded_with_the_precision_that_made_it(tmp_path, capsys):
    build_vae("tiny-f2d4").save(tmp_path / "vae")
    words = ("--vae", tmp_path / "vae", "--data", "digits", "--resolution", "16", "--workers", "0")
    words += ("--out", tmp_path / "cache", "--precision", "bf16")
    assert run_here("scripts/cache_latents.py", *words) == 0
    assert "--precision bf16: fp32 is used" in capsys.readouterr().out
    assert json.loads((tmp_path / "cache" / "meta.json").read_text())["precision"] == "fp32"
    assert run_here("scripts/cache_latents.py", *words) == 0  # the same command again


@pytest.mark.usefixtures("no_halves")
def test_the_doctor_says_it_too(monkeypatch):
    monkeypatch.setattr("utils.doctor.machine.gpu_names", list)
    (found,) = check_device(tiny_config("run.precision=bf16"), 1, None)
    assert found.status == "ok" and "run.precision=bf16: fp32 is used" in found.text
    (found,) = check_device(tiny_config(), 1, None)
    assert "fp32 is used" not in found.text
