"""The README is true: its commands parse, its files exist.

python -m pytest tests/test_readme.py
"""

import re
import shlex

import pytest

from models.vae import build_vae
from tests.tiny import ROOT, TINY, run_script

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^    (\S.*)$", TEXT, re.M)]
SCRIPTS = [c for c in COMMANDS if re.match(r"(python|accelerate launch) ", c)]
ELSEWHERE = ("--checkpoint", "prepare_data", "import_official", "export_vae", "reproduce_tables")
ELSEWHERE += ("doctor", "cache_latents", "data.latents", "vae_stats", "visualize_latents")
FLAGS_ONLY = ("_official", "export_vae", "vae_stats", "visualize_latents")  # they need weights
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


def test_caching_latents_and_training_from_them_pass_their_dry_runs(tmp_path):
    """Of a VAE without published weights, on digits, as there is nothing else here."""
    (caching,) = [c for c in SCRIPTS if "cache_latents" in c]
    tiny = {
        "--vae sdvae": f"--vae {tmp_path / 'vae'}",
        "--out data/sdvae-latents": f"--out {tmp_path / 'c'}",
    }
    tiny["packed --path data/imagenet256"] = "digits --resolution 16 --workers 0"
    for old, new in tiny.items():
        assert old in caching
        caching = caching.replace(old, new)
    build_vae("tiny-f2d4").save(tmp_path / "vae")
    for more in (["--dry-run"], []):
        done = run_script(*words(caching), *more)
        assert done.returncode == 0, done.stderr
    (training,) = [c for c in SCRIPTS if "data.latents" in c]
    parts = [w.replace("data/sdvae-latents", str(tmp_path / "c")) for w in words(training)]
    small = [w for w in TINY if "run.name" not in w] + ["vae.train=false", "vae.name=tiny-f2d4"]
    small += [f"vae.weights={tmp_path / 'vae'}", "data.num_classes=null"]
    done = run_script(*parts, *small, "--dry-run")
    assert done.returncode == 0 and "note:" not in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("command", [c for c in SCRIPTS if "doctor" in c])
def test_the_doctor_speaks_to_its_end(command):
    """Neither data nor weights are here, so it finds faults; it names them and goes on."""
    done = run_script(*words(command))
    assert done.returncode == 2 and not done.stderr, done.stderr
    assert "FAIL  data" in done.stdout and "memory    about" in done.stdout


@pytest.mark.parametrize("command", [c for c in SCRIPTS if "reproduce_tables" in c])
def test_the_commands_about_tables_run(command, tmp_path):
    dry = ["--dry-run"] if " digits" in command else []
    done = run_script(*words(command.replace("DIR", str(tmp_path))), *dry)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in SCRIPTS if any(w in c for w in FLAGS_ONLY)])
def test_the_other_commands_have_the_flags_of_their_scripts(command):
    script, *rest = words(command)
    of_subcommand = rest[:1] if "visualize" in script else []
    helped = run_script(script, *of_subcommand, "--help").stdout
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
