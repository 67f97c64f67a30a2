"""GPU memory: what does not fit fails, and with the advice it fits.

python -m pytest tests/utils/doctor/test_memory.py        (planted estimates)
"""

import re
from types import SimpleNamespace

import pytest

from tests.tiny import tiny_config
from utils.cost import settings
from utils.cost.memory import RESERVE, Estimate
from utils.doctor import memory
from utils.files import format_bytes

GIB = 2**30
PER_IMAGE = {"none": GIB, "sit": GIB * 3 // 4, "vae": GIB // 2, "both": GIB // 4}
PLANTED = {
    kind: Estimate({"weights": 2 * GIB}, {n: [0, n * size] for n in (2, 3)}, waiting=1000)
    for kind, size in PER_IMAGE.items()
}


def needed(kind: str, accumulation: int = 1) -> int:
    return PLANTED[kind].peak(64, accumulation) + RESERVE


@pytest.fixture
def checked(monkeypatch):
    """Check 64 images of a rank against so many bytes => (status, text)."""
    monkeypatch.setattr(settings, "estimate", lambda c, *_: PLANTED[c.run.checkpointing])
    monkeypatch.setattr(settings, "skeleton", lambda *_: None)
    monkeypatch.setattr(memory, "gpu_names", lambda: ["GPU"])
    nets = SimpleNamespace(sit=SimpleNamespace(config=SimpleNamespace(num_classes=10)))

    def run(available: int | None, *overrides: str) -> tuple[str, str]:
        config = tiny_config("run.batch_size=64", *overrides)
        (finding,) = memory.check_memory(config, nets, 1, 64, available, None)
        return finding[:2]

    return run


@pytest.mark.parametrize("kind", ["sit", "vae", "both"])
def test_the_cheapest_checkpointing_that_suffices_is_advised(kind, checked):
    status, text = checked(needed(kind))
    assert status == "FAIL" and format_bytes(needed(kind)) in text
    (advice,) = re.findall(r"run\.\w+=\w+", text)
    assert advice == f"run.checkpointing={kind}" and checked(needed(kind), advice)[0] != "FAIL"


def test_micro_batches_are_advised_where_checkpointing_does_not_suffice(checked):
    short = (PLANTED["both"].peak(64, 3) + PLANTED["both"].peak(64, 4)) // 2 + RESERVE
    status, text = checked(short)  # 3 does not divide 64
    advice = re.findall(r"run\.\w+=\w+", text)
    assert status == "FAIL" and advice == ["run.checkpointing=both", "run.accumulation=4"]
    assert checked(short, *advice)[0] != "FAIL"
    status, text = checked(GIB)
    assert status == "FAIL" and "take a smaller sit.size" in text


def test_a_frozen_vae_keeps_nothing_that_checkpointing_could_save(checked):
    text = checked(needed("both"), "vae.train=false", "vae.weights=hub")[1]
    assert "run.checkpointing=sit run.accumulation=" in text


def test_what_just_fits_is_a_warning_and_says_what_more_micro_batches_save(checked):
    need = needed("none")
    status, text = checked(need)
    halved = format_bytes(needed("none", 2))
    assert status == "warn" and f"run.accumulation=2 {halved}" in text
    assert checked(2 * need)[0] == "ok"
    assert f"run.accumulation=2 {halved}" in checked(None)[1]  # its memory is unknown


def test_on_a_cpu_memory_is_ram_and_the_time_of_a_step_is_told(monkeypatch):
    operations = [SimpleNamespace(op=SimpleNamespace(flops=10**9))] * 64
    monkeypatch.setattr(memory, "extrapolated", lambda found, images: operations[:images])
    monkeypatch.setattr(memory, "matmul_peak", lambda *_: {"fp32": 0.064})  # TFLOP/s
    monkeypatch.setattr(memory, "gpu_names", list)
    monkeypatch.setattr(settings, "estimate", lambda c, *_: PLANTED["none"])
    nets = SimpleNamespace(sit=SimpleNamespace(config=SimpleNamespace(num_classes=10)))
    for settings_of_run in ((), ("run.accumulation=4",)):
        config = tiny_config("run.batch_size=64", "run.steps=1800", *settings_of_run)
        found = list(memory.check_memory(config, nets, 1, 64, None, None))
        (_, ram, _), (status, time, name) = found
        assert "RAM" in ram and "GPU" not in ram + time
        assert (status, name) == ("ok", "time")
        assert "roughly 2 s a step" in time and "60 minutes for 1,800 steps" in time
