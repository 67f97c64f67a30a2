"""Data sheets of the GPUs that a prediction is made for, and the hardware that a config names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from models.checks.errors import UserError, shown
from utils.files import expand_path

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peaks of the data sheet, without sparsity: operations per second of dense matrix products
    in half precision (float32 sums), TF32 and float32; bytes per second and bytes of its memory."""

    name: str
    half: float
    tf32: float
    fp32: float
    bandwidth: float
    memory: int  # what a program finds free on an empty card
    source: str


# Memory: cards sold as 80 GB show about 79.2 GiB (H100) and 79.1 GiB (A100), 141 GB 139.8 GiB,
# 48 GB 44.5 GiB (L40S, with ECC), 24 GB 23.5 GiB.
DEVICES = {
    "h100": Device(
        *("H100 SXM", 989e12, 494e12, 67e12, 3.35e12, int(79.2 * GIB)),
        "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
    ),
    "h200": Device(
        *("H200 SXM", 989e12, 494e12, 67e12, 4.8e12, int(139.8 * GIB)),
        "https://www.nvidia.com/en-us/data-center/h200/",
    ),
    "a100": Device(
        *("A100 SXM 80 GB", 312e12, 156e12, 19.5e12, 2.039e12, int(79.1 * GIB)),
        "https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "l40s": Device(
        *("L40S", 362e12, 183e12, 91.6e12, 0.864e12, int(44.5 * GIB)),
        "https://www.nvidia.com/en-us/data-center/l40s/",
    ),
    "rtx4090": Device(
        *("RTX 4090", 165.2e12, 82.6e12, 82.6e12, 1.008e12, int(23.5 * GIB)),
        "NVIDIA Ada GPU architecture whitepaper, version 2.1, appendix A",
    ),
}


def find_device(name: str) -> Device:
    """The device of a name, however it is spelled: h100, H100, RTX 4090."""
    if device := DEVICES.get(_key(name)):
        return device
    raise UserError(f"no data sheet of the device {shown(name)}: known are {', '.join(DEVICES)}")


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


class Hardware(NamedTuple):
    """What a run is meant for: so many GPUs of one kind."""

    count: int
    device: Device


def named_hardware(configs: Iterable[str]) -> Hardware | None:
    """The first that a header of these files names."""
    return next(filter(None, (hardware_of(Path(expand_path(config))) for config in configs)), None)


def hardware_of(config: Path) -> Hardware | None:
    """The GPUs that the header of a config names (`#   hardware   8 x H100`); None where it names
    none, as for runs on a CPU, or others than those of `DEVICES`."""
    line = re.search(r"^# +hardware +(\d+) x ([A-Za-z0-9 ]*[A-Za-z0-9])", config.read_text(), re.M)
    device = DEVICES.get(_key(line[2])) if line else None
    return Hardware(int(line[1]), device) if line and device else None
