"""`train_repae.py` in which one rank alone meets NaN images at one step: run by test_nonfinite.py.

accelerate launch --multi_gpu --num_processes 2 tests/nonfinite_ranks.py RANK STEP key=value ...
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_repae
from utils import cli
from utils.distributed import Ranks

RANK, STEP = int(sys.argv.pop(1)), int(sys.argv.pop(1))
honest = train_repae.train_step


def train_step(nets, x, y, draws, config, step, cached=()):
    bad = step == STEP and Ranks().rank == RANK
    return honest(nets, x * math.nan if bad else x, y, draws, config, step, cached)


if __name__ == "__main__":
    train_repae.train_step = train_step
    cli.run(train_repae.main)
