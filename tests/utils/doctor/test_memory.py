"""GPU memory: what does not fit fails, and with the advice it fits.

python -m pytest tests/utils/doctor/test_memory.py    (planted estimates; real ones: test_cost.py)
"""

import re
from types import SimpleNamespace

import pytest

from tests.tiny import tiny_config
from utils.doctor import memory
from utils.files import format_bytes
from utils.training.cost import RESERVE, Estimate

GIB = 2**30
PER_IMAGE = {False: GIB, True: GIB // 4}  # without and with gradient checkpointing
PLANTED = {
    thrifty: Estimate({"weights": 2 * GIB}, {n: [0, n * size] for n in (2, 3)}, waiting=1000)
    for thrifty, size in PER_IMAGE.items()
}


@pytest.fixture
def checked(monkeypatch):
    """Check 64 images of a rank against so many bytes => (status, text)."""
    monkeypatch.setattr(memory, "estimate", lambda c, *_: PLANTED[c.run.checkpointing == "both"])
    monkeypatch.setattr(memory, "skeleton", lambda *_: None)
    nets = SimpleNamespace(sit=SimpleNamespace(config=SimpleNamespace(num_classes=10)))

    def run(available: int | None, *overrides: str) -> tuple[str, str]:
        config = tiny_config("run.batch_size=64", *overrides)
        (finding,) = memory.check_memory(config, nets, 64, available, None)
        return finding[:2]

    return run


def test_too_little_gpu_memory_and_the_advice_that_helps(checked):
    short = (PLANTED[False].peak(64, 3) + PLANTED[False].peak(64, 4)) // 2 + RESERVE
    status, text = checked(short)  # 3 does not divide 64
    assert status == "FAIL" and format_bytes(short) in text
    advice = re.search(r"set (run\.accumulation=\d+)", text).group(1)
    assert advice == "run.accumulation=4" and checked(short, advice)[0] == "ok"
    status, text = checked(GIB)
    assert status == "FAIL" and "take a smaller sit.size" in text


def test_checkpointing_is_advised_where_micro_batches_do_not_suffice(checked):
    short = PLANTED[False].peak(64, 64) - 1 + RESERVE
    status, text = checked(short)
    advice = re.search(r"set (run\.\w+=both) (run\.\w+=\d+) ", text).groups()
    assert status == "FAIL" and advice[0] == "run.checkpointing=both"
    assert checked(short, *advice)[0] != "FAIL"


def test_what_just_fits_is_a_warning_and_says_what_more_micro_batches_save(checked):
    need = PLANTED[False].peak(64) + RESERVE
    status, text = checked(need)
    halved = format_bytes(PLANTED[False].peak(64, 2) + RESERVE)
    assert status == "warn" and f"run.accumulation=2 {halved}" in text
    assert checked(2 * need)[0] == "ok"
    assert f"run.accumulation=2 {halved}" in checked(None)[1]  # no GPU here
