"""What a result was computed with: versions of the packages, commit of this source tree."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def versions() -> dict[str, str | None]:
    """What this was computed with, for whoever repeats it."""
    names = ("torch", "diffusers", "accelerate", "timm", "numpy")
    return {"python": platform.python_version(), "commit": git_commit()} | {
        name: version(name) for name in names
    }


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
