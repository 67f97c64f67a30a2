"""For a config and GPUs: the cheapest settings with which a step fits, and how fast it then is.

    python scripts/settings_that_fit.py --config configs/imagenet256/repae-sdvae-xl2.yaml
    python scripts/settings_that_fit.py --config C.yaml --devices rtx4090 h100 --processes 1 8

One line for each kind of GPU and number of GPUs, a row of a Markdown table. Nothing is measured:
the real step is counted on tensors without content, and memory and speed are predicted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli

CARDS = ("rtx4090", "l40s", "h100", "h200")  # 24, 48, 80 and 141 GB


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add = parser.add_argument
    add("--devices", nargs="+", default=list(CARDS), metavar="NAME", help="GPUs by name")
    add("--processes", nargs="+", type=cli.positive, default=[1, 8], metavar="N", help="GPUs")
    return cli.parse_with_overrides(parser, argv)


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from collections.abc import Iterator
from typing import Any

from train_repae import train_step
from utils.config.load import load_config
from utils.cost.devices import GIB, Device, find_device
from utils.cost.settings import Estimates, predict_cheapest
from utils.training.networks import skeleton

COLUMNS = ("config", "GPUs", "settings", "GiB", "images/s, all GPUs", "compiled", "days, 80 epochs")


def main() -> None:
    args = parse_args()
    config = load_config(args.config, args.overrides)
    devices = [find_device(name) for name in args.devices]
    print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n", flush=True)
    for row in rows(config, devices, args.processes):
        print(line(row), flush=True)


def rows(config: Any, devices: list[Device], processes: list[int]) -> Iterator[list[str]]:
    """The cells of each row."""
    estimates = None
    for ranks in processes:
        if estimates is None or config.run.shard_optimizer:
            nets = skeleton(config, config.data.num_classes or 1000)
            estimates = Estimates(config, nets, train_step, ranks)
        for device in devices:
            found = predict_cheapest(estimates, device, ranks)
            gpus = f"{ranks} x {device.name} ({device.memory / GIB:.0f} GiB)"
            yield [config.run.name, gpus, *(cells(found) if found else ("nothing fits", *"----"))]


def cells(found: dict[str, Any]) -> tuple[str, ...]:
    rates = (found["images_per_second_all_ranks"], found["images_per_second_fused_all_ranks"])
    return (
        found["settings"],
        f"{found['peak_memory_gib']:.1f}",
        *(f"{rate:.0f}" for rate in rates),
        f"{found['days_to_80_epochs']:.1f}",
    )


def line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    cli.run(main)
