"""The doctor's command line: a line a finding, the count, the exit code.

python -m pytest tests/scripts/test_doctor.py        (CPU; the checks: tests/utils/doctor)
"""

import re
import sys

import pytest

from scripts import doctor
from tests.tiny import TINY, run_script
from utils import cli
from utils.doctor import examination


def call(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.run(doctor.main)
    return end.value.code


def test_the_exit_code_says_whether_something_failed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(examination.memory, "check_memory", lambda *_: iter(()))
    out = f"run.out={tmp_path}"
    assert call(monkeypatch, *TINY, out, "ema.warmup=true") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(re.fullmatch(r"(ok|warn|FAIL) +\w+ +\S.*", line) for line in lines)
    assert last == f"0 failed, 0 warnings, {len(lines)} ok"
    assert call(monkeypatch, *TINY, out, "--processes", 3) == 2
    assert "1 failed" in capsys.readouterr().out


def test_a_config_of_the_papers_runs_is_known_by_its_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(examination.memory, "check_memory", lambda *_: iter(()))
    words = ("--config", "configs/imagenet256/base.yaml", *TINY, "data.num_classes=10")
    assert call(monkeypatch, *words, f"run.out={tmp_path}", "run.batch_size=64") == 0
    assert re.search(r"warn +batch +.*run.batch_size=256", capsys.readouterr().out)


def test_a_config_that_cannot_load_is_one_line(monkeypatch, capsys):
    assert call(monkeypatch, "run.stepz=1") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"error: [^\n]*stepz[^\n]*steps[^\n]*\n", printed.err)


@pytest.mark.slow
def test_the_quickstarts_config_from_the_command_line(tmp_path):
    words = ("encoder.weights=[random]", "loss.reg.perceptual_net=timm:test_resnet@random")
    words += (f"run.out={tmp_path}",)
    done = run_script("scripts/doctor.py", "--config", "configs/quickstart.yaml", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout and done.stderr == ""
