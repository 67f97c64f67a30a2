"""What a program says in a Python that lacks packages.

python -m pytest tests/utils/process/test_installation.py
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from utils import cli
from utils.process import installation

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = [*ROOT.glob("*.py"), *(ROOT / "scripts").glob("[!_]*.py")]


def start_bare(*words: str) -> subprocess.Popen:
    """Python without site-packages."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, "-S", *words],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_every_program_says_in_one_line_which_python_lacks_what():
    started = {program: start_bare(str(program)) for program in PROGRAMS}
    assert len(started) > 15
    for program, process in started.items():
        _, said = process.communicate(timeout=120)
        (line,) = said.splitlines()
        assert process.returncode == 2 and line.startswith("error: No module named"), program
        assert f"{sys.executable} (Python 3." in line and "lacks torch, torchvision," in line
        assert f"-m pip install -r {ROOT / 'requirements.txt'}" in line


def test_an_import_that_fails_later_is_said_in_the_same_way(monkeypatch, capsys):
    monkeypatch.setattr(
        installation, "find_spec", lambda name: None if name == "sklearn" else object()
    )

    def load_digits():
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")

    with pytest.raises(SystemExit) as end:
        cli.run(load_digits)
    assert end.value.code == 2 and "lacks scikit-learn;" in capsys.readouterr().err


def test_a_fault_of_this_program_keeps_its_traceback():
    error = ModuleNotFoundError("No module named 'utils.absent'", name="utils.absent")
    assert installation.explain(error) == ""


def test_every_listed_package_is_known_by_its_module():
    """Here everything that the tests need is installed."""
    for file in ("requirements.txt", "requirements-dev.txt"):
        assert installation.missing(file) == {}


# ---------------------------------------------------------------- the files of requirements


def listed(file: str) -> dict[str, Requirement]:
    """{package: its line} of a requirements file, without comments, hashes and markers."""
    lines = re.findall(r"^[\w][^#\\;\n]*", (ROOT / file).read_text(), re.M)
    return {(r := Requirement(line.strip())).name.lower().replace("_", "-"): r for line in lines}


ASKED = listed("requirements.txt") | listed("requirements-dev.txt")


def test_the_lock_has_a_version_that_fits_of_everything_that_is_asked_for():
    lock = listed("requirements.lock")
    for name, asked in ASKED.items():
        (pin,) = lock[name].specifier
        assert pin.operator == "==" and asked.specifier.contains(pin.version), name


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    oldest = listed("requirements-minimum.txt")
    for name, asked in ASKED.items():
        if name in ("ruff", "pyright"):  # which lint, and run nothing of ours
            continue
        (pin,), (bound,) = oldest[name].specifier, asked.specifier
        same = pin.version == bound.version or pin.version.startswith(f"{bound.version}.")
        assert pin.operator == "==" and bound.operator == ">=" and same, name
