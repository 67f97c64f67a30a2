"""One record of sampling settings: flags, checks, identity and defaults are the same everywhere.

python -m pytest tests/utils/sampling/test_settings.py
"""

import inspect
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from models.checks.errors import UserError
from utils import cli, samplers
from utils.config.looking import EvalConfig, PreviewConfig
from utils.sampling.settings import (
    ADDED,
    DEFAULT,
    SamplingSettings,
    describe_presets,
    flag_fields,
    flag_of,
)

ROOT = Path(__file__).resolve().parents[3]


def parse(*words: str, **defaults) -> SamplingSettings:
    parser = cli.Parser()
    SamplingSettings.add_arguments(parser, **defaults)
    return SamplingSettings.from_args(parser.parse_args(words))


def test_flags_and_record_have_the_same_defaults():
    assert parse() == SamplingSettings()
    own = parse(solver="ode-ab2", steps=50)
    assert own == replace(SamplingSettings(), solver="ode-ab2", steps=50)


def test_a_preset_is_a_solver_and_its_steps_and_flags_of_their_own_win():
    for name, preset in samplers.PRESETS.items():
        found = parse("--preset", name)
        assert found == parse("--solver", preset.solver, "--steps", str(preset.steps))
        assert found == parse(preset=name)
    default, fast = (samplers.PRESETS[name] for name in (DEFAULT, "fast"))
    assert default == ("sde", 250, None)  # of the published tables
    words = ("--steps", "7", "--preset", "fast")  # in any order
    for given in (words, (*words[2:], *words[:2])):
        found = parse(*given)
        assert (found.solver, found.steps) == (fast.solver, 7)
    found = parse("--preset", "fast", "--solver", "ode-heun")
    assert (found.solver, found.steps) == ("ode-heun", fast.steps)
    with pytest.raises(UserError, match=r"--preset.*'quick'"):
        parse("--preset", "quick")


def test_the_help_and_the_documentation_name_each_preset_with_its_cost_and_error():
    described = describe_presets()
    table = (ROOT / "docs" / "sampling.md").read_text()
    for name, (solver, steps, error) in samplers.PRESETS.items():
        calls = samplers.network_calls(solver, steps)
        words = f", error {error:.1e}" if error else ""
        assert f"{name} = {solver}, {steps} steps ({calls} calls{words})" in described
        row = f"| `{name}` | `{solver}` | {steps} | {calls} | {f'{error:.1e}' if error else 'none'}"
        assert row in table


def test_the_default_guidance_interval_is_one_constant():
    settings = SamplingSettings()
    interval = (settings.guidance_low, settings.guidance_high)
    defaults = [
        inspect.signature(function).parameters["guidance"].default
        for function in (samplers.sample, samplers.Field)
    ]
    assert [interval, *defaults] == [samplers.GUIDANCE_INTERVAL] * 3 == [(0.0, 1.0)] * 3


def test_every_field_is_a_flag_of_its_own_type():
    values = {"solver": "ode-heun", "steps": 7, "cfg_scale": 1.5, "guidance_low": 0.125}
    values |= {"guidance_high": 0.5, "timestep_shift": 2.5, "class_balanced": True, "seed": 9}
    values |= {"precision": "fp32", "path": "cosine", "uint8": "truncate", "tf32": True}
    values |= {"compile": True, "batch_size": 8, "decode_batch_size": 4}
    values |= {"decode_precision": "bf16", "cfg_channels": 3, "heun_guidance": "predictor"}
    assert values.keys() == {f.name for f in flag_fields()}
    words = []
    for name, value in values.items():
        words += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    assert asdict(parse(*words)) == values | {"classes": ()}


def test_speed_and_memory_are_no_part_of_the_identity():
    settings = SamplingSettings()
    others = replace(settings, batch_size=1, decode_batch_size=1)
    assert settings.that_decide_pixels() == others.that_decide_pixels()
    left_out = asdict(settings).keys() - settings.that_decide_pixels().keys()
    assert left_out == {"batch_size", "decode_batch_size", *ADDED}


def test_the_configuration_knows_the_same_solvers():
    for section in (PreviewConfig, EvalConfig):
        (solver,) = (each for each in fields(section) if each.name == "solver")
        assert solver.metadata["choices"] == tuple(samplers.SOLVERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heun_guidance": "predictor"}, "predictor needs --solver ode-heun: sde has no corrector"),
        ({"heun_guidance": "published"}, "--heun-guidance published must be one of own, predictor"),
        ({"cfg_channels": -1}, "--cfg-channels -1 must be at least 0"),
        ({"solver": "sde", "steps": 1}, "--solver sde needs 2 steps or more, not 1"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"cfg_scale": float("nan")}, "--cfg-scale nan must be a finite number"),
        ({"cfg_scale": -1.0}, r"--cfg-scale -1\.0 must be at least 0"),
        ({"timestep_shift": 0.0}, r"--timestep-shift 0\.0 must be above 0"),
        ({"guidance_high": 1.5}, r"--guidance-high 1\.5 must be at least 0 and at most 1"),
        ({"guidance_low": 0.8, "guidance_high": 0.3}, "must not be above --guidance-high"),
        ({"solver": "euler"}, "--solver euler must be one of ode-euler"),
        ({"precision": "fp16"}, "--precision fp16 must be one of bf16, fp32"),
        ({"decode_precision": "fp16"}, "--decode-precision fp16 must be one of fp32, tf32, bf16"),
        ({"batch_size": -1}, "--batch-size -1 must be at least 1"),
        ({"batch_size": 500}, "at most 100"),
    ],
)
def test_values_that_no_run_could_use(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SamplingSettings(), **changes).check()


def test_a_parser_needs_no_torch():
    code = "import sys, utils.sampling.settings, loss.interpolant; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
