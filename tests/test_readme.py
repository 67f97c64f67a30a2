"""The README is true: its commands parse, its files exist.

python -m pytest tests/test_readme.py
"""

import re
import shlex

import pytest

from tests.tiny import ROOT, run_script

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^    (\S.*)$", TEXT, re.M)]
SCRIPTS = [c for c in COMMANDS if re.match(r"(python|accelerate launch) ", c)]
ELSEWHERE = ("--checkpoint", "prepare_data", "import_official", "export_vae", "reproduce_tables")
DRY_RUNS = [c for c in SCRIPTS if not any(word in c for word in ELSEWHERE)]


def words(command: str) -> list[str]:
    """The script and its arguments, without what launches it."""
    parts = shlex.split(command)
    return parts[next(i for i, word in enumerate(parts) if word.endswith(".py")) :]


@pytest.mark.parametrize("command", DRY_RUNS)
def test_every_command_passes_its_dry_run(command):
    done = run_script(*words(command), *(() if "--dry-run" in command else ("--dry-run",)))
    assert done.returncode == 0, done.stderr


def test_preparing_data_passes_its_dry_run(tmp_path):
    from PIL import Image

    (tmp_path / "train" / "n01").mkdir(parents=True)
    Image.new("RGB", (300, 300)).save(tmp_path / "train" / "n01" / "a.png")
    (command,) = [c for c in SCRIPTS if "prepare_data" in c]
    parts = [w.replace("/data/imagenet", str(tmp_path)) for w in words(command)]
    done = run_script(*parts, "--dry-run")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in SCRIPTS if "reproduce_tables" in c])
def test_the_commands_about_tables_run(command, tmp_path):
    done = run_script(*words(command.replace("DIR", str(tmp_path))))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in SCRIPTS if "_official" in c or "export_" in c])
def test_the_other_commands_have_the_flags_of_their_scripts(command):
    script, *rest = words(command)
    helped = run_script(script, "--help").stdout
    assert all(word in helped for word in rest if word.startswith("--"))


def test_the_two_commands_are_there_and_executable():
    for name in ("quickstart", "test"):
        assert f"bash scripts/{name}.sh" in COMMANDS
        assert (ROOT / "scripts" / f"{name}.sh").stat().st_mode & 0o111
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_every_file_that_is_named_exists():
    named = re.findall(r"`((?:configs|scripts|tests|utils|models|loss|assets)/[\w/.-]+)`", TEXT)
    named += re.findall(r"\]\((assets/[\w.-]+)\)", TEXT)
    missing = [n for n in named if not list(ROOT.glob(n)) and not list(ROOT.glob(f"{n}.*"))]
    assert named and not missing


def test_every_setting_that_is_named_exists():
    from utils.config import load_config

    settings = re.findall(r"`((?:\w+\.)+\w+=[^`\s]+)", TEXT)
    for pair in settings:
        if "FILE" not in pair:
            key = pair.split("=")[0].split(".")
            node = load_config([])
            for name in key:
                node = getattr(node, name)
    assert len(settings) > 10
