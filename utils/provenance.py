"""What a result was computed with: device, versions of the packages, commit of this source tree."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def versions() -> dict[str, str | None]:
    """What this was computed with, for whoever repeats it."""
    names = ("torch", "diffusers", "accelerate", "timm", "numpy")
    return {"python": platform.python_version(), "commit": git_commit()} | {
        name: version(name) for name in names
    }


def device_name(device: torch.device) -> str:
    """Of a GPU or of the CPU, as the driver or the system calls it."""
    import torch  # takes seconds, which --help need not wait for

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """As the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = [line for line in file if line.startswith("model name")]
        return lines[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine() or "cpu"


def git_commit() -> str | None:
    """Commit of this source tree ("-dirty" if files differ from it); None outside git."""
    here = Path(__file__).resolve().parent
    command = [
        "git",
        "-C",
        str(here),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return answer.stdout.strip() or None
