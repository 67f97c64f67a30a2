"""The frame around the scripts: who answers, and how."""

import pytest

from models.errors import UserError
from utils import cli


def refuse():
    raise UserError("--steps 0 must be\n at least 1")


def parse_help():
    cli.Parser("What it does.").parse_args(["--help"])


@pytest.mark.parametrize(("rank", "code"), [(None, 2), ("0", 2), ("1", 0)])
def test_of_several_ranks_one_says_what_is_wrong(rank, code, monkeypatch, capsys):
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        cli.answer_help(refuse)
    said = capsys.readouterr().err
    assert end.value.code == code
    assert said == ("" if code == 0 else "error: --steps 0 must be at least 1\n")


def test_of_several_ranks_one_prints_the_help(monkeypatch, capsys):
    for rank, text in (("0", "What it does."), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            cli.answer_help(parse_help)
        assert end.value.code == 0 and text in capsys.readouterr().out


def test_every_default_is_shown_zero_included(capsys):
    parser = cli.Parser("What it does.\n\n    python script.py --steps 3")
    parser.add_argument("--steps", type=int, default=0, help="number of steps")
    parser.add_argument("--quiet", action="store_true", help="say less")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "number of steps (default: 0)" in said and "python script.py --steps 3" in said
    assert "say less (default" not in said
