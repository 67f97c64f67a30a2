"""Data sheets of GPUs, and the hardware that the header of a config names.

python -m pytest tests/utils/cost/test_devices.py
"""

from pathlib import Path

import pytest

from models.checks.errors import UserError
from tests.tiny import ROOT
from utils.cost.devices import DEVICES, Hardware, find_device, hardware_of

H100 = DEVICES["h100"]


def test_a_device_is_found_however_it_is_spelled():
    assert find_device("RTX 4090") is find_device("rtx-4090") is DEVICES["rtx4090"]
    with pytest.raises(UserError, match=r"V100.*known are h100, h200, a100"):
        find_device("V100")


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_a_data_sheet_is_plausible(device):
    """TF32 does half of half precision; the peaks are those of dense products."""
    assert 0.48 < device.tf32 / device.half < 0.51 and device.fp32 <= device.tf32
    assert 100 < device.half / device.bandwidth < 450 and device.source


HEADERS = {
    "#   hardware   8 x H100 (paper); about 530 GPU-hours": Hardware(8, H100),
    "# hardware 1 x RTX 4090": Hardware(1, DEVICES["rtx4090"]),
    "#   hardware   4 x A100, 80 GB": Hardware(4, DEVICES["a100"]),
    "#   hardware   2 CPU cores": None,
    "#   hardware   8 x V100": None,
    "run: {name: x}": None,
}


@pytest.mark.parametrize("text", HEADERS)
def test_the_hardware_of_a_header(text, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"# A run.\n#\n{text}\n")
    assert hardware_of(file) == HEADERS[text]


def test_every_shipped_config_of_imagenet_names_its_hardware():
    files = [f for f in Path(ROOT, "configs").rglob("*.yaml") if "paper " in f.read_text()]
    assert len(files) > 30
    assert not [str(f) for f in files if hardware_of(f) is None]
