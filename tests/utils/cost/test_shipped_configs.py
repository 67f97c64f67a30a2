"""Every shipped config fits the hardware that its header names, by the estimate.

python -m pytest -m slow tests/utils/cost/test_shipped_configs.py      (minutes; no GPU needed)
"""

from pathlib import Path

import pytest

import train_repae
from tests.tiny import ROOT
from utils.config.load import load_config
from utils.config.schema import Config, per_rank_batch
from utils.cost.devices import GIB, Hardware, hardware_of
from utils.cost.memory import RESERVE, estimate
from utils.training.networks import skeleton


def needs(c: Config, hardware: Hardware, train: bool) -> tuple:
    """What the memory of a step depends on, but for what only lowers it: terms that are left out
    of the loss."""
    sizes = (c.vae.name, c.sit_shape(), c.data.resolution, c.encoder.names)
    run = (c.run.batch_size, c.run.accumulation, c.run.checkpointing, c.run.precision)
    return repr(sizes), run, hardware, train


def shipped() -> list[str]:
    """The names of configs that need GPUs: one for each different step. A step with a frozen VAE
    needs less than the same with one that trains."""
    found: dict[tuple, str] = {}
    for file in sorted(Path(ROOT, "configs").rglob("*.yaml")):
        hardware = hardware_of(file)
        if hardware:
            c = load_config([file])
            found.setdefault(needs(c, hardware, c.vae.train), str(file.relative_to(ROOT)))
    return [name for (*key, train), name in found.items() if train or (*key, True) not in found]


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped())
def test_a_shipped_config_fits_the_hardware_of_its_header(name):
    file = Path(ROOT, name)
    hardware, c = hardware_of(file), load_config([file])
    found = estimate(c, skeleton(c, 1000), train_repae.train_step, hardware.count)
    rank_batch = per_rank_batch(c, hardware.count)
    need = found.peak(rank_batch, c.run.accumulation) + RESERVE
    assert need <= hardware.device.memory, (
        f"{name} needs {need / GIB:.1f} GiB of {hardware.device.memory / GIB:.1f}: "
        "see scripts/settings_that_fit.py"
    )
