"""Modes and flags of scripts/benchmark.py: what goes together, and what is refused by name.

python -m pytest tests/utils/benchmark/test_flags.py
"""

import pytest

from models.checks.errors import UserError
from scripts.benchmark import parse_args
from utils.benchmark import flags

MODES = {
    "": flags.TRAINING,
    "--data --trace t.json run.compile=true --steps 3 --warmup 0": flags.TRAINING,
    "--sample --solver sde --solver-steps 50 --steps 2 vae.name=tiny-f2d4": flags.SAMPLING,
    "--sample --checkpoint here": flags.SAMPLING,
    "--data-only --steps 3 data.workers=2": flags.LOADING,
    "--predict h100 --processes 8 run.batch_size=256": flags.PREDICTION,
    "--compare a.json b.json": flags.COMPARISON,
}


@pytest.mark.parametrize("words", MODES)
def test_the_mode_of_a_command(words):
    assert parse_args(words.split()).mode == MODES[words]


REFUSED = {
    "--sample --data-only": "--sample and --data-only",
    "--predict h100 --compare a.json b.json": "--predict and --compare",
    "--sample --data": "--data is for training, not for --sample",
    "--data-only --trace t.json": "--trace is for training, not for --data-only",
    "--predict h100 --warmup 3": "--warmup .* not for --predict",
    "--processes 8": "--processes is for --predict, not for training",
    "--solver ode-heun": "--solver is for --sample, not for training",
    "--compile": "--compile is for --sample",
    "--data-only --cfg-scale 2": "--cfg-scale is for --sample, not for --data-only",
    "--checkpoint here": "--checkpoint is for --sample",
    "--compare a.json b.json --json c.json": "--json .* not for --compare",
    "--compare a.json b.json run.steps=3": "not 'run.steps=3'",
    "--compare a.json b.json c.json": "not 'c.json'",
    "--sample --checkpoint here run.seed=3": "--checkpoint brings",
    "--json out.txt": "--json out.txt must end in .json",
    "--trace out.gz": "--trace out.gz must end in .json",
    "--steps 0": "'0'",
    "--sample --solver ode-heun --solver-steps 0": "'0'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_go_together_is_refused_by_name(words):
    with pytest.raises(UserError, match=REFUSED[words]) as error:
        parse_args(words.split())
    assert "\n" not in str(error.value)


def test_no_output_is_an_input_or_another_output(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    here, state, new = tmp_path, tmp_path / "state.json", tmp_path / "new.json"
    with pytest.raises(UserError, match=r"--json .*state.json lies inside the input"):
        parse_args(["--sample", "--checkpoint", f"{here}", "--json", f"{state}"])
    with pytest.raises(UserError, match=r"--trace .*new.json is .*new.json, an input"):
        parse_args(["--json", f"{new}", "--trace", f"{new}"])


def test_the_steps_of_the_solver_are_not_those_that_are_measured():
    args = parse_args(["--sample", "--steps", "2", "--solver-steps", "7", "--seed", "3"])
    settings = flags.sampling_settings(args)
    assert (settings.steps, settings.seed, args.steps) == (7, 3, 2)
