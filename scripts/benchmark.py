"""Measure training on this machine: images/s, memory, and the time of each phase of a step.

    python scripts/benchmark.py --config configs/imagenet256/repae-sdvae-xl2.yaml run.batch_size=32

The networks have random weights and the images are noise, so that nothing is downloaded; several
GPUs: `accelerate launch`. Or measure sampling (--sample) or the data loader (--data-only), predict
for a GPU that need not be here (--predict), compare two results (--compare A.json B.json).
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli
from utils.benchmark import flags
from utils.benchmark.compare import compare


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__, conflict_handler="resolve")
    flags.add_arguments(parser)
    args = cli.parse_with_overrides(parser, argv)
    args.mode = flags.check(args, parser.parse_args([]))
    return args


def show_comparison() -> None:
    print(compare(*parse_args().compare))


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds
    if parse_args().mode == flags.COMPARISON:
        cli.run(show_comparison)

from dataclasses import asdict
from typing import Any

import torch

from models.checks.errors import UserError
from train_repae import train_step
from utils import distributed
from utils.benchmark import machine, report
from utils.benchmark.loading import measure_loading
from utils.benchmark.sampling import measure_sampling
from utils.benchmark.training import measure_training
from utils.config.load import flat, load_config
from utils.config.schema import Config
from utils.cost.devices import hardware_of
from utils.cost.prediction import predict
from utils.files import expand_path
from utils.process.ending import is_main
from utils.provenance import versions


def main() -> None:
    args = parse_args()
    if args.mode == flags.COMPARISON:
        return show_comparison()
    config = load_config(args.config, args.overrides)
    if args.mode == flags.PREDICTION:
        if is_main():
            result = look_ahead(args, config)
            tell(report.prediction_lines(result), result, args.json)
        return
    result = measure(args, config)
    if distributed.Ranks().is_main:
        tell(report.lines(result), result, args.json)
    distributed.Ranks().wait()


def tell(lines: Iterable[str], result: dict[str, Any], out: Path | None) -> None:
    print("\n".join(lines), flush=True)
    if out:
        report.write(out, result)


def look_ahead(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The prediction, and what it is made of."""
    ranks = args.processes or ranks_of(args)
    result = predict(config, args.predict, ranks, train_step, args.steps)
    return result | {"versions": versions(), "settings": flat(asdict(config))}


def ranks_of(args: argparse.Namespace) -> int:
    """The GPUs that the batch of a config is meant for: as its header says, if the batch is that of
    the config."""
    if not args.config or any(word.startswith("run.batch_size=") for word in args.overrides):
        return 1
    hardware = hardware_of(Path(expand_path(args.config[-1])))
    return hardware.count if hardware else 1


def measure(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The result of a mode that measures."""
    run, (steps, warmup) = config.run, flags.STEPS[args.mode]
    steps, warmup = args.steps or steps, warmup if args.warmup is None else args.warmup
    accelerator = distributed.start(config.run_dir, [], run.tf32, run.rank_timeout)
    device = accelerator.device if args.mode != flags.LOADING else torch.device("cpu")
    try:
        if args.mode == flags.SAMPLING:
            settings = flags.sampling_settings(args)
            result = measure_sampling(config, settings, steps, warmup, args.checkpoint)
        elif args.mode == flags.LOADING:
            result = measure_loading(config, accelerator, steps, warmup)
        else:
            how = (steps, warmup, args.data, args.trace)
            result = measure_training(config, accelerator, train_step, *how)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UserError(
            f"this does not fit into the memory of the device ({reason}): lower run.batch_size or "
            "--batch-size, or see scripts/doctor.py for settings that fit"
        ) from None
    settings = {} if args.checkpoint else flat(asdict(config))
    return result | machine.describe_device(device) | {"settings": settings}


if __name__ == "__main__":
    cli.run(main)
