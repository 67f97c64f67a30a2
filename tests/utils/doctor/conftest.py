"""What the tests of the doctor share: a tiny run examined in this process, without a network."""

from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from tests.tiny import tiny_config
from utils.doctor import examination
from utils.doctor.examination import examine


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """An empty torch cache, and a hub that is not asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


class Findings(dict):
    """{name of a check: [(status, text), ...]} of one examination."""

    def only(self, name: str) -> tuple[str, str]:
        (finding,) = self[name]
        return finding

    @property
    def failed(self) -> bool:
        return any(status == "FAIL" for lines in self.values() for status, _ in lines)


@pytest.fixture
def examined(tmp_path):
    """Examine the tiny run with overrides, all checks."""
    from train_repae import train_step

    def run(*overrides, ranks=1, gpu_memory=None, published=False) -> Findings:
        config = tiny_config(f"run.out={tmp_path / 'out'}", *map(str, overrides))
        found = Findings()
        for status, text, name in examine(config, ranks, gpu_memory, published, train_step):
            found.setdefault(name, []).append((status, text))
        return found

    return run


@pytest.fixture
def quick(examined, monkeypatch):
    """The same without the memory check, which takes most of the time."""
    monkeypatch.setattr(examination.memory, "check_memory", lambda *_: iter(()))
    return examined


@pytest.fixture
def images(tmp_path):
    """Write noise of `side` x `side` + 3 pixels to NAME/CLASS; class "." is the folder itself."""

    def write(name: str, per_class: dict[str, int], side: int = 20) -> Path:
        root, rng = tmp_path / name, np.random.default_rng(0)
        for folder, num in per_class.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(num):
                pixels = rng.integers(0, 256, (side, side + 3, 3), "u1")
                Image.fromarray(pixels).save(root / folder / f"{i}.png")
        return root

    return write
