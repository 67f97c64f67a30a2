"""Check a run before it starts: data, weights, shapes, batch, disk, memory, packages.

    python scripts/doctor.py --config configs/imagenet256/repae-sdvae-xl2.yaml --processes 8

One line a check: ok, warn, or FAIL with what to change. Takes 10 to 30 s. Nothing is
loaded, downloaded or written. Exit code 2 if something failed.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add = parser.add_argument
    ranks = cli.number(int, at_least=1, at_most=100_000)
    add("--processes", type=ranks, metavar="N", help="ranks; default: the visible GPUs")
    gib = cli.number(float, above=0, at_most=100_000)
    add("--gpu-memory", type=gib, metavar="GIB", help="of one GPU; default: what is free here, or "
        "without a GPU what the hardware in the header of the config has")  # fmt: skip
    return cli.parse_with_overrides(parser, argv)


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from collections import Counter

import torch

from train_repae import train_step
from utils import distributed
from utils.config.load import load_config
from utils.cost.devices import named_hardware
from utils.doctor import machine
from utils.doctor.examination import examine


def main() -> int:
    args = parse_args()
    config = load_config(args.config, args.overrides)
    ranks = args.processes or max(distributed.launched_ranks(), torch.cuda.device_count(), 1)
    memory = int(args.gpu_memory * 2**30) if args.gpu_memory else machine.gpu_memory()
    if memory is None and (hardware := named_hardware(args.config)):
        memory = hardware.device.memory
    published = any("imagenet" in str(file) for file in args.config)
    found = Counter()
    for status, text, name in examine(config, ranks, memory, published, train_step):
        print(f"{status:<4}  {name:<8}  {' '.join(text.split())}", flush=True)
        found[status] += 1
    print(f"{found['FAIL']} failed, {found['warn']} warnings, {found['ok']} ok")
    return 2 if found["FAIL"] else 0


if __name__ == "__main__":
    cli.run(main)
