"""README.md and docs/*.md are true: every command runs or passes its dry run, every name exists.

python -m pytest tests/test_readme.py
"""

import re
import runpy
import shlex
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from models.vae import build_vae
from scripts import benchmark
from tests.tiny import ROOT, TINY, train_here
from utils.config import Config
from utils.config.load import load_config
from utils.config.schema import all_settings

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
COMMANDS = [
    line.split("  #")[0].strip()
    for line in re.findall(r"^ {4,6}((?:python|accelerate|bash) .*)$", TEXT, re.M)
]
# Of docs/own-data.md: from a folder to a report on a CPU; tests/test_own_data.py runs them in turn.
WALK = [
    c
    for c in COMMANDS
    if re.search(r"\b(own32|own-cpu|own-data/cpu)\b", c) and not c.startswith("bash")
]
CHECKS = [c for c in COMMANDS if c.startswith("python -m pytest ")]
SCRIPTS = [c for c in COMMANDS if not c.startswith("bash") and c not in (*WALK, *CHECKS)]
CHECKPOINT = r"exps/[\w-]+/checkpoints/0400000"


def words(command: str) -> list[str]:
    """The script and its arguments, without what launches it."""
    parts = shlex.split(command)
    return parts[next(i for i, word in enumerate(parts) if word.endswith(".py")) :]


def those(*parts: str, without: str = "\n") -> list[str]:
    """The commands that contain all `parts`; each is in exactly one of the tests below."""
    return [c for c in SCRIPTS if all(p in c for p in parts) and without not in c]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a program in this process as python does; returns its exit code and what it printed."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run_command(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out + printed.err

    yield run_command
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a tiny run with one checkpoint."""
    out = tmp_path_factory.mktemp("exps")
    assert train_here(out, "run.steps=2") == 0
    return out / "tiny"


@pytest.fixture
def here(trained, tmp_path):
    """Turns a command of the documentation into one about tiny things that are here: the run above
    for a real one, the VAE of its checkpoint for the published one, digits for real images."""
    checkpoint = trained / "checkpoints" / "0000002"

    def translate(command: str) -> list[str]:
        command = re.sub(CHECKPOINT, str(checkpoint), command)
        command = command.replace("exps/NAME", str(trained))
        command = re.sub(r"(--vae|vae_stats\.py) sdvae", rf"\1 {checkpoint / 'vae'}", command)
        command = re.sub(r"--data \w+ --path \S+", "--data digits --resolution 16", command)
        return [
            str(tmp_path / w) if before == "--out" or w == "my-vae" else w
            for before, w in zip(["", *words(command)], words(command))
        ]

    return translate


def dry_runs() -> list[str]:
    """Each once, though the documentation has it with and without --dry-run or a launcher."""
    commands = [*those("train_repae", without="data.latents"), *those("evaluate_fid.py")]
    return list(dict.fromkeys(shlex.join(words(c.replace(" --dry-run", ""))) for c in commands))


@pytest.mark.parametrize("command", dry_runs())
def test_training_and_evaluating_pass_their_dry_run(command, run):
    code, printed = run(*words(command), "--dry-run")
    assert code == 0, printed


@pytest.mark.parametrize("command", those("sample_ddp.py"))
def test_sampling_writes_its_images(command, run, here, tmp_path):
    small = ["--num-samples", "4", "--steps", "2", "--precision", "fp32"]
    code, printed = run(*here(command), *small)
    assert code == 0, printed
    assert list(tmp_path.rglob("*.npz"))


@pytest.mark.parametrize("command", those("doctor"))
@pytest.mark.slow
def test_the_doctor_reports_every_check(command, run):
    """Neither data nor weights are here, so some checks fail; it names them and continues."""
    small = ["sit.size=SiT-S/2", "sit.depth=8", "vae.train=false"]  # memory is estimated sooner
    small.append("disc.pretrain_steps=0")
    code, printed = run(*words(command), *small)
    assert code == 2 and "FAIL  data" in printed and "memory    about" in printed, printed


@pytest.mark.parametrize("command", those("prepare_data"))
def test_preparing_data_passes_its_dry_run(command, run, tmp_path):
    (tmp_path / "train" / "n01").mkdir(parents=True)
    Image.new("RGB", (300, 300)).save(tmp_path / "train" / "n01" / "a.png")
    parts = [w.replace("/data/imagenet", str(tmp_path)) for w in words(command)]
    parts = [str(tmp_path / "train") if w == "pictures" else w for w in parts]
    code, printed = run(*parts, "--dry-run")
    assert code == 0, printed


@pytest.mark.slow
def test_caching_latents_runs_and_training_from_them_passes_its_dry_run(run, tmp_path):
    """With a VAE that has no published weights, on digits, as there is nothing else here."""
    (caching,), (training,) = those("cache_latents"), those("data.latents")
    vae, cache = tmp_path / "vae", tmp_path / "cache"
    build_vae("tiny-f2d4").save(vae)
    parts = words(caching.replace("packed --path data/imagenet256", "digits --resolution 16"))
    parts = [{"sdvae": str(vae), "data/sdvae-latents": str(cache)}.get(w, w) for w in parts]
    code, printed = run(*parts, "--workers", "0")
    assert code == 0, printed
    small = [w for w in TINY if "run.name" not in w] + ["vae.train=false"]
    small += ["data.num_classes=null", "data.path=null"]
    parts = [w.replace("data/sdvae-latents", str(cache)) for w in words(training)]
    code, printed = run(*parts, *small, f"vae.weights={vae}", "--dry-run")
    assert code == 0 and "note:" not in printed, printed


@pytest.mark.parametrize("command", those("reproduce_tables"))
def test_the_commands_about_tables_run(command, run, tmp_path):
    dry = ["--dry-run"] * (" digits" in command)
    code, printed = run(*words(command.replace("DIR", str(tmp_path))), *dry)
    assert code == 0, printed


@pytest.mark.parametrize(
    "command", [c for name in ("export_vae", "vae_stats", "visualize_latents") for c in those(name)]
)
def test_the_commands_about_a_trained_vae_run(command, run, here, tmp_path):
    code, printed = run(*here(command))
    assert code == 0, printed
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [*those("import_official"), *those("export_pipeline")])
def test_the_commands_that_import_or_export_have_valid_arguments(command):
    """The files are not here; tests/scripts/test_import_official.py imports such files, and
    tests/utils/pipeline/test_export.py exports."""
    script, *arguments = words(command)
    parse_args = runpy.run_path(str(ROOT / script))["parse_args"]
    assert arguments[0] in map(str, vars(parse_args(arguments)).values())


@pytest.mark.parametrize("command", those("scripts/benchmark"))
def test_the_commands_that_measure_have_valid_arguments(command):
    """tests/scripts/test_benchmark.py runs such commands."""
    args = benchmark.parse_args(words(command)[1:])
    load_config([ROOT / file for file in args.config], args.overrides)


@pytest.mark.parametrize("command", [*those("train_classifier"), *those("nearest_images")])
def test_the_commands_about_own_data_have_valid_arguments(command):
    """tests/test_own_data.py runs such commands."""
    script, *arguments = words(command)
    runpy.run_path(str(ROOT / script))["parse_args"](arguments)


@pytest.mark.parametrize("command", CHECKS)
def test_the_tests_that_docs_verification_names_exist(command):
    """Running them is up to the suite."""
    file, *names = shlex.split(command)[3].split("::")
    source = (ROOT / file).read_text()
    for name in names:
        plain, _, case = name.rstrip("]").partition("[")
        assert re.search(rf"^ *(def|class) {plain}\b", source, re.M)
        assert case in source


def test_each_claim_of_docs_verification_has_its_command():
    page = (ROOT / "docs" / "verification.md").read_text()
    claims, commands = (
        re.findall(r"\| \((\w)\) \|$", page, re.M),
        re.findall(r"  # (\w)$", page, re.M),
    )
    assert claims == commands and len(claims) > 25


def test_every_command_is_tested_above():
    tested = (
        "train_repae",
        "evaluate_fid",
        "sample_ddp",
        "doctor",
        "prepare_data",
        "cache_latents",
    )
    tested += ("reproduce_tables", "export_vae", "vae_stats", "visualize_latents")
    tested += ("report",)
    tested += ("import_official", "benchmark", "settings_that_fit", "export_pipeline")
    tested += ("train_classifier", "nearest_images")
    assert len(SCRIPTS) > 20
    assert not [c for c in SCRIPTS if Path(words(c)[0]).stem not in tested]
    for name in ("quickstart", "test"):
        assert f"bash scripts/{name}.sh" in COMMANDS
        assert (ROOT / "scripts" / f"{name}.sh").stat().st_mode & 0o111
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_every_file_that_is_named_exists():
    folders = "configs|scripts|tests|utils|models|loss|assets|docs"
    for page in PAGES:
        text = page.read_text()
        named = [ROOT / n for n in re.findall(rf"`((?:{folders})/[\w/.-]+)`", text)]
        named += [page.parent / n for n in re.findall(r"\]\(([\w./-]+)\)", text)]
        assert not [n for n in named if not n.exists()], page


def test_the_readme_links_every_page_of_the_documentation():
    readme = PAGES[0].read_text()
    assert len(readme.splitlines()) <= 170
    assert not [p.name for p in PAGES[1:] if f"](docs/{p.name})" not in readme]


def test_every_setting_that_is_named_exists():
    known = {name for name, _, _ in all_settings(Config())}
    pattern = r"`((?:run|data|vae|sit|disc|latent_norm|encoder|loss|ema|preview|eval)\.[\w.]+)"
    named = set(re.findall(pattern, TEXT)) | set(re.findall(r"[` ]((?:\w+\.)+\w+)=", TEXT))
    assert len(named) > 20
    old = {"disc.alone_steps", "loss.diffusion.to_vae", "run.gradient_checkpointing"}
    assert named - known == old  # said to be old names
