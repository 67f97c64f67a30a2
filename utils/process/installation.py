"""Which packages this Python lacks, said in one line. Imports Python's own modules alone."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = "requirements.txt"
# names by which packages are imported, where these are others
MODULES = {
    "pillow": "PIL",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}


def require_torch() -> None:
    """`ModuleNotFoundError` in a Python in which no program can run."""
    if find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def explain(error: ModuleNotFoundError) -> str:
    """What to do about a package that could not be imported; "" if the project needs none of that
    name, or it is there."""
    lacking = missing(REQUIREMENTS)
    if (error.name or "").partition(".")[0] not in lacking.values():
        return ""
    return f"error: {error}: {remedy(lacking, REQUIREMENTS)}"


def missing(file: str) -> dict[str, str]:
    """{package: its module} of what a requirements file lists and this Python does not find."""
    return {name: module for name, module in _listed(file) if find_spec(module) is None}


def remedy(names, file: str) -> str:
    """Which Python lacks the packages `names` of a requirements file, and how to get them."""
    venv = ROOT / ".venv"
    inactive = (venv / "bin" / "activate").exists() and Path(sys.prefix) != venv
    activate = f"run `source {venv}/bin/activate` first, or " if inactive else ""
    version = ".".join(map(str, sys.version_info[:3]))
    return (
        f"{sys.executable} (Python {version}) lacks {', '.join(names)}; {activate}install with "
        f"`{sys.executable} -m pip install -r {ROOT / file}`"
    )


def _listed(file: str) -> list[tuple[str, str]]:
    """(package, its module) of every line of a requirements file, and of the files it includes."""
    found = []
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found += _listed(line.split()[1])
        elif name := re.match(r"[\w-]+", line):
            found.append((name[0], MODULES.get(name[0], name[0].replace("-", "_"))))
    return found


if __name__ == "__main__":  # FILE: what scripts/environment.sh asks of a user's own environment
    if lacking := missing(sys.argv[1]):
        print(f"error: {remedy(lacking, sys.argv[1])}", file=sys.stderr)
        sys.exit(2)
