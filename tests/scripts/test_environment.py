"""scripts/environment.sh: what is installed when, and whose environment is used.

python -m pytest tests/scripts/test_environment.py
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands in for every Python: makes environments of itself, and notes what pip is asked for.
PYTHON = """#!/usr/bin/env bash
case "$*" in
*"-m venv"*)
    mkdir -p "${@: -1}/bin"
    cp "$0" "${@: -1}/bin/python"
    echo "export PATH=${@: -1}/bin:\\$PATH" >"${@: -1}/bin/activate"
    ;;
*"pip install"*)
    echo "$*" >>installed
    [ ! -e killed ]
    ;;
*utils.process.installation*) [ ! -e lacking ] || { echo "error: lacks torch" >&2; exit 2; } ;;
esac
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """A repository with little more than the script, and a Python on the PATH."""
    for name in ("scripts", "bin", "own/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "scripts")
    for file in ("requirements.txt", "requirements-dev.txt", "requirements.lock"):
        (tmp_path / file).write_text(f"{file}\n")
    for python in ("bin/python3", "own/bin/python"):
        (tmp_path / python).write_text(PYTHON)
        (tmp_path / python).chmod(0o755)
    return tmp_path


def use(place: Path, file: str, **variables: str) -> subprocess.CompletedProcess:
    """Source the script; prints the python that comes first on the PATH."""
    path = f"{place / 'bin'}:/usr/bin:/bin"
    command = f"set -euo pipefail; source {place}/scripts/environment.sh {file}; command -v python"
    return subprocess.run(
        ["bash", "-c", command],
        env={"PATH": path, "HOME": os.environ.get("HOME", "/")} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def installed(place: Path) -> list[str]:
    """The files that pip was asked to install since the last call."""
    notes = place / "installed"
    lines = notes.read_text().splitlines() if notes.exists() else []
    notes.unlink(missing_ok=True)
    return [line.split("-r ")[1] for line in lines]


def test_nothing_is_installed_twice_and_a_changed_file_is_noticed(place):
    done = use(place, "requirements.txt")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == ".venv/bin/python", done.stderr
    assert installed(place) == ["requirements.txt"]
    assert use(place, "requirements.txt").returncode == 0 and installed(place) == []
    use(place, "requirements-dev.txt")
    assert installed(place) == ["requirements-dev.txt"]
    use(place, "requirements.txt")
    use(place, "requirements-dev.txt")
    assert installed(place) == []
    (place / "requirements.txt").write_text("another\n")  # which requirements-dev.txt includes
    use(place, "requirements-dev.txt")
    assert installed(place) == ["requirements-dev.txt"]


def test_the_lock_stands_for_the_other_files_until_one_of_them_is_installed(place):
    use(place, "requirements.lock")
    use(place, "requirements-dev.txt")
    use(place, "requirements.txt")
    assert installed(place) == ["requirements.lock"]
    (place / "requirements.txt").write_text("another\n")
    use(place, "requirements.txt")
    assert installed(place) == ["requirements.txt"]
    use(place, "requirements.lock")  # the versions may be others now
    assert installed(place) == ["requirements.lock"]


def test_an_installation_that_was_killed_is_done_again(place):
    (place / "killed").touch()
    assert use(place, "requirements.txt").returncode != 0
    (place / "killed").unlink()
    installed(place)
    assert use(place, "requirements.txt").returncode == 0
    assert installed(place) == ["requirements.txt"]
    (place / ".venv/bin/python").unlink()  # of a Python that is gone
    (place / "requirements.txt").write_text("another\n")
    assert use(place, "requirements.txt").returncode == 0
    assert installed(place) == ["requirements.txt"]


@pytest.mark.parametrize("how", ["variable", "venv", "conda"])
def test_an_environment_of_the_users_own_is_taken_as_it_is(place, how):
    own = str(place / "own")
    variables = {
        "variable": {"REPA_E_PYTHON": f"{own}/bin/python"},
        "venv": {"VIRTUAL_ENV": own},
        "conda": {"CONDA_PREFIX": own, "CONDA_DEFAULT_ENV": "mine"},
    }[how]
    done = use(place, "requirements-dev.txt", **variables)
    assert done.stdout.strip() == f"{own}/bin/python", done.stderr
    assert installed(place) == [] and not (place / ".venv").exists()
    (place / "lacking").touch()
    done = use(place, "requirements-dev.txt", **variables)
    assert done.returncode == 2 and done.stderr.splitlines() == ["error: lacks torch"]


def test_condas_base_and_our_own_environment_are_none_of_the_users(place):
    base = {"CONDA_PREFIX": str(place / "own"), "CONDA_DEFAULT_ENV": "base"}
    assert use(place, "requirements.txt", **base).stdout.splitlines()[-1] == ".venv/bin/python"
    (place / "requirements.txt").write_text("another\n")
    use(place, "requirements.txt", VIRTUAL_ENV=str(place / ".venv"))
    assert installed(place) == ["requirements.txt"] * 2


def test_a_python_that_is_not_there_is_said_in_one_line(place):
    done = use(place, "requirements.txt", REPA_E_PYTHON="/nowhere/bin/python")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and "/nowhere/bin/python" in line
