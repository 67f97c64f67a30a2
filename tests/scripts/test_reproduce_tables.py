"""The command line of the paper's tables: what it prints and writes, and mistakes in one line.

python -m pytest tests/scripts/test_reproduce_tables.py    (the tables: tests/utils/paper)
"""

import re
import sys

import pytest

from scripts import reproduce_tables
from utils import cli


def call(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce_tables.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.run(reproduce_tables.main)
    return ended.value.code or 0


def test_command_prints_three_lines_to_paste(monkeypatch, capsys):
    assert call(monkeypatch, "command", "2/sit-xl-repae", "--processes", 4) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if not x.startswith("#")]
    scripts = [re.search(r"(\w+)\.py", line)[1] for line in lines]
    assert scripts == ["train_repae", "sample_ddp", "evaluate_fid"]
    assert lines[0].endswith("run.steps=100000") and "--num_processes 4" in lines[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["command", "7/init-40k"], "no row 7/init-40k: nearest is 7/init-400k"),
        (["command", "8/dit-vavae"], "8/dit-vavae is published only: DiT backbone"),
        (["command", "9/e2evavae-80ep-cfg"], "guidance scale is not published"),
        (["show", "--table", "redme"], "no table redme: nearest is readme"),
        (["show", "--tabel"], "unrecognized arguments: --tabel"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(words, said, monkeypatch, capsys):
    assert call(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_list_and_show_print_and_write_the_tables(monkeypatch, capsys, tmp_path):
    results = ("--results", tmp_path)  # holds no record
    assert call(monkeypatch, "list", *results) == 0
    assert "  7/init-400k " in capsys.readouterr().out
    assert call(monkeypatch, "show", "--table", "7", *results) == 0
    printed = capsys.readouterr().out
    assert "| 7/init-400k |" in printed and "| 6/full |" not in printed
    assert call(monkeypatch, "show", *results, "--out", tmp_path / "out") == 0
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == "tables.md"
    assert "| 7/init-400k |" in file.read_text() and "| 6/full |" in file.read_text()


def test_digits_prints_its_commands(monkeypatch, capsys):
    assert call(monkeypatch, "digits", "--seeds", 3, "--dry-run", "run.steps=5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("run.seed=3 run.steps=5" in line for line in lines)
