"""The benchmark's command line, on tiny networks: what it prints, and what its JSON holds.

python -m pytest tests/scripts/test_benchmark.py        (CPU; its parts: tests/utils/benchmark)
"""

import json
import re
import subprocess
import sys

import pytest
import torch

from scripts.benchmark import parse_args, ranks_of
from tests.tiny import ROOT, TINY, run_here, run_script, train_here
from utils.benchmark.clock import DATA, OTHER
from utils.config.load import load_config
from utils.training.phases import PHASES

SCRIPT = "scripts/benchmark.py"
SHORT = ("--steps", 3, "--warmup", 1)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The files of one measurement of training: the result, the trace."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = ("--json", folder / "new" / "a.json", "--trace", folder / "trace.json")
    assert run_here(SCRIPT, *TINY, *SHORT, *files) == 0
    return folder / "new" / "a.json", folder / "trace.json"


def test_training_is_measured_by_phase_with_all_that_explains_it(training):
    found = json.loads(training[0].read_text())
    assert found["images_per_second"] == pytest.approx(8000 / found["step_ms"]["median"])
    low, middle, high = (found["step_ms"][name] for name in ("low", "median", "high"))
    assert 0 < low <= middle <= high
    assert list(found["phases"]) == [DATA, *PHASES, OTHER]
    assert sum(phase["share"] for phase in found["phases"].values()) == pytest.approx(1)
    total = sum(phase["ms_per_image"] for phase in found["phases"].values())
    assert total == pytest.approx(found["step_ms"]["median"] / 8, rel=0.5)  # medians of each
    assert found["peak_memory_gib"] > 0.05 and 0 < found["share_of_matmul_peak"] < 1
    assert found["gflop_per_image"] == pytest.approx(0.3985, rel=0.01)  # of the tiny networks
    assert (found["steps"], found["warmup_steps"], found["ranks"]) == (3, 1, 1)
    assert found["settings"]["run.batch_size"] == 8 and found["device"]
    assert found["versions"]["torch"] and "commit" in found["versions"]


def test_the_trace_shows_the_phases(training):
    events = json.loads(training[1].read_text())["traceEvents"]
    assert set(PHASES) <= {event.get("name") for event in events}


def test_two_results_are_compared_without_torch(training, tmp_path):
    found = json.loads(training[0].read_text())
    found["images_per_second"] *= 2
    (tmp_path / "b.json").write_text(json.dumps(found))
    words = [SCRIPT, "--compare", training[0], tmp_path / "b.json"]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert re.search(r"^images/s a rank +\S+ +\S+ +2\.000x$", done.stdout, re.M)
    assert "| argparse\n" in done.stderr and "| torch\n" not in done.stderr
    assert run_here(SCRIPT, "--compare", training[0], tmp_path / "b.json") == 0


def test_the_loader_is_measured_alone(tmp_path, capsys):
    words = ("--data-only", "data.workers=1", *SHORT, "--json", tmp_path / "d.json")
    assert run_here(SCRIPT, *TINY, *words) == 0
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["mode"] == "data" and found["data"] == "digits" and found["workers_per_rank"] == 1
    assert found["images_per_second"] > 100 and 0 < found["processor_seconds_per_image"] < 0.1
    assert "processor ms an image" in capsys.readouterr().out


def test_sampling_is_measured_of_random_networks_and_of_a_checkpoint(tmp_path, capsys):
    small = ("--sample", *SHORT, "--solver-steps", 2, "--batch-size", 4, "--precision", "fp32")
    out = ("--json", tmp_path / "s.json")
    assert run_here(SCRIPT, *TINY, *small, *out) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["mode"] == "sampling" and found["sampling"]["steps"] == 2
    assert found["images_per_second"] == pytest.approx(4000 / found["batch_ms"]["median"])
    assert train_here(tmp_path, "run.steps=1") == 0
    checkpoint = tmp_path / "tiny" / "checkpoints" / "0000001"
    assert run_here(SCRIPT, *small, *out, "--checkpoint", checkpoint) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["checkpoint"] == str(checkpoint) and found["settings"] == {}


def test_a_step_that_does_not_fit_is_one_line(monkeypatch, capsys):
    def allocate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    monkeypatch.setattr("scripts.benchmark.measure_training", allocate)
    assert run_here(SCRIPT, *TINY) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "CUDA out of memory" in error and "run.batch_size" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sample", "--data"), "--data is for training, not for --sample"),
        (("--compare", "a.json", "b.json"), "a.json not found"),
        (("--json", "a.txt"), "must end in .json"),
        ((*TINY, "run.batch_size=7", "run.accumulation=2"), "run.batch_size=7"),
        (("run.stepz=1",), "stepz"),
    ],
)
def test_a_wrong_command_is_one_line(words, message, capsys):
    assert run_here(SCRIPT, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


FIXED = ["images_per_second", "images_per_second_fused", "peak_memory_gib", "gflop_per_image"]
FIXED += ["kernels_per_step", "host_syncs_per_step", "phases"]


@pytest.mark.slow
def test_what_is_predicted_stands_beside_what_is_measured(training, tmp_path, capsys):
    out = tmp_path / "p.json"
    assert run_here(SCRIPT, *TINY, "--predict", "H100", "--processes", 2, "--json", out) == 0
    predicted, measured = json.loads(out.read_text()), json.loads(training[0].read_text())
    assert not [name for name in FIXED if name not in predicted]
    assert predicted["gflop_per_image"] == pytest.approx(measured["gflop_per_image"], rel=1e-6)
    assert predicted["host_syncs_per_step"] == 0 and predicted["ranks"] == 2
    assert set(predicted["phases"]) == set(measured["phases"]) - {DATA}
    assert predicted["settings"] == measured["settings"]
    printed = capsys.readouterr().out
    assert "predicted for 2 x H100" in printed and "nothing was measured" in printed
    assert run_here(SCRIPT, "--compare", training[0], out) == 0
    assert run_here(SCRIPT, "--predict", "abacus") == 2
    assert "h200" in capsys.readouterr().err


def test_a_prediction_is_for_the_gpus_of_the_configs_header():
    config = str(ROOT / "configs" / "imagenet256" / "repae-sdvae-xl2.yaml")
    for words, ranks in ((["--config", config], 8), (["--config", config, "run.batch_size=32"], 1)):
        assert ranks_of(parse_args([*words, "--predict", "h100"])) == ranks
    assert ranks_of(parse_args(["--config", str(ROOT / "configs/quickstart.yaml")])) == 1
    assert ranks_of(parse_args([])) == 1


def test_the_report_of_a_gpu_has_valid_commands(tmp_path):
    """scripts/gpu_report.sh with a `python3` that only says what it would run."""
    words = 'python3() { echo "$*"; }; export -f python3; bash scripts/gpu_report.sh "$0"'
    done = subprocess.run(
        ["bash", "-c", words, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    commands = [line.split() for line in done.stdout.splitlines()]
    assert ["-m", "pytest", "-q", "-m", "gpu", "tests"] in commands
    results = set()
    for arguments in (command[1:] for command in commands if command[0] == SCRIPT):
        args = parse_args(arguments)
        config = load_config([ROOT / file for file in args.config], args.overrides)
        results.add(args.json)
        assert config.run.batch_size == 32 or args.sample
    assert len(results) == 10


def test_an_unknown_part_of_the_report_is_refused_before_the_first_begins(tmp_path):
    words = 'python3() { echo "$*"; }; export -f python3; bash scripts/gpu_report.sh "$0" small no'
    done = subprocess.run(
        ["bash", "-c", words, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "unknown part: no\n")


@pytest.mark.slow
def test_two_ranks_report_once_and_add_up(tmp_path):
    words = (*TINY, *SHORT, "--json", tmp_path / "two.json")
    done = run_script(SCRIPT, *map(str, words), ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("images/s") == 1
    found = json.loads((tmp_path / "two.json").read_text())
    assert found["ranks"] == 2
    assert found["images_per_second_all_ranks"] == pytest.approx(2 * found["images_per_second"])
