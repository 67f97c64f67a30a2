"""The command line of scripts/benchmark.py: its modes, and the flags of each. Imports no torch."""

import argparse
from typing import Any

from models.checks.errors import UserError
from utils import cli
from utils.process import written
from utils.sampling.settings import SamplingSettings, flag_of

TRAINING, SAMPLING, LOADING, PREDICTION, COMPARISON = (
    "training",
    "sampling",
    "data",
    "prediction",
    "comparison",
)
# the flag that chooses a mode, by the name of its argument; without one, training is measured
CHOICES = {
    "sample": SAMPLING,
    "data_only": LOADING,
    "predict": PREDICTION,
    "compare": COMPARISON,
}
# the modes that have a flag, by the name of its argument
FLAGS = {
    "config": (TRAINING, SAMPLING, LOADING, PREDICTION),
    "json": (TRAINING, SAMPLING, LOADING, PREDICTION),
    "steps": (TRAINING, SAMPLING, LOADING, PREDICTION),
    "warmup": (TRAINING, SAMPLING, LOADING),
    "data": (TRAINING,),
    "trace": (TRAINING,),
    "processes": (PREDICTION,),
    "checkpoint": (SAMPLING,),
    "solver_steps": (SAMPLING,),
}
# measured and warm-up steps
STEPS = {TRAINING: (20, 5), SAMPLING: (3, 1), LOADING: (50, 5)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of the benchmark; `parser` resolves conflicts, since --steps are measured steps
    here and those of the solver in `SamplingSettings`."""
    group: Any = parser.add_argument_group("with --sample")
    SamplingSettings.add_arguments(group)
    add = group.add_argument
    add("--solver-steps", type=cli.positive, help="of the solver; default: that of --preset")
    what = "networks of a checkpoint, of a run's newest, or of OWNER/NAME of the hub"
    add("--checkpoint", type=cli.file_path, metavar="DIR", help=what)
    cli.add_config_arguments(parser)
    add = parser.add_argument
    add("--sample", action="store_true", help="measure sampling instead of training")
    add("--data-only", action="store_true", help="measure the data loader of the config alone")
    add("--predict", metavar="DEVICE", help="count, and predict for h100, h200, a100, l40s or "
        "rtx4090, which need not be here")  # fmt: skip
    add("--compare", nargs=2, type=cli.file_path, metavar=("A.json", "B.json"), help="two results")
    add("--steps", type=cli.positive, help="measured steps or batches; default: 20 of training, "
        "3 of sampling, 50 of data; predicted are run.steps")  # fmt: skip
    add("--warmup", type=cli.not_negative, help="steps left out before; default: 5, sampling 1")
    add("--data", action="store_true", help="train on the data of the config, not on noise")
    add("--trace", type=cli.file_path, metavar="FILE.json", help="also trace three steps for "
        "chrome://tracing or Perfetto")  # fmt: skip
    add("--processes", type=cli.positive, metavar="N", help="GPUs to predict for; default: as the "
        "header of the config says, or 1 if run.batch_size is given")  # fmt: skip
    add("--json", type=cli.file_path, metavar="FILE.json", help="also write the result to a file")


def check(args: argparse.Namespace, defaults: argparse.Namespace) -> str:
    """The mode; `UserError` for flags that do not go together. `defaults`: the arguments of an
    empty command line."""
    chosen = [name for name in CHOICES if getattr(args, name)]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(map(flag_of, chosen))} do not go together: choose one")
    mode = CHOICES[chosen[0]] if chosen else TRAINING
    for name, default in vars(defaults).items():
        allowed = FLAGS.get(name, (SAMPLING,))
        if name in CHOICES or name == "overrides" or getattr(args, name) == default:
            continue
        if mode not in allowed:
            other = {SAMPLING: "--sample", PREDICTION: "--predict"}.get(allowed[0], "training")
            where = flag_of(chosen[0]) if chosen else "training, which is measured here"
            raise UserError(f"{flag_of(name)} is for {other}, not for {where}: leave it out")
    if mode == COMPARISON and args.overrides:
        raise UserError(f"--compare takes two files, and not {args.overrides[0]!r}: leave it out")
    if mode == SAMPLING and args.checkpoint and (args.config or args.overrides):
        raise UserError("--checkpoint brings its networks: leave out --config and key=value")
    inputs = [*args.config, args.checkpoint]
    for name, kind in (("json", written.BENCHMARK), ("trace", written.TRACE)):
        if out := getattr(args, name):
            cli.check_output(flag_of(name), out, kind, inputs)
            inputs.append(out)
    return mode


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """Those among the arguments."""
    return SamplingSettings.from_args(
        argparse.Namespace(**(vars(args) | {"steps": args.solver_steps}))
    )
