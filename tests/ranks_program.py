"""A program of several ranks that goes wrong in one of them: run by test_ranks.py.

    accelerate launch --multi_gpu --num_processes 2 tests/ranks_program.py KIND MINUTES

Each rank prints "rank R pid P" once all have joined.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.checks.errors import UserError
from utils import cli, distributed
from utils.distributed import Ranks
from utils.process.signals import Signals


def kill(ranks: Ranks, number: int) -> None:
    if ranks.rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), number)
    while True:
        ranks.sum(torch.ones(1))
        time.sleep(0.05)


def fail(ranks: Ranks, error: Exception, who: tuple[int, ...] = (1,)) -> None:
    if ranks.rank in who:
        raise error
    while True:
        ranks.sum(torch.ones(1))


def slow_main(ranks: Ranks) -> None:
    """Longer than a collective may take (10 s more than a rank may be silent); and an error."""
    assert ranks.on_main(lambda: time.sleep(18) or 7) == 7
    ranks.main_first(lambda: time.sleep(1))
    fail_on_main(ranks)


def fail_on_main(ranks: Ranks) -> None:
    def build() -> None:
        raise RuntimeError("no weights")

    ranks.on_main(build)


def die_on_main(ranks: Ranks) -> None:
    ranks.on_main(lambda: os.kill(os.getpid(), signal.SIGKILL))


def mistake_on_main(ranks: Ranks) -> None:
    def build() -> None:
        raise UserError("no such file")

    ranks.on_main(build)


def stop(ranks: Ranks) -> None:
    """Both ranks take many steps; one is told to stop."""
    with Signals() as signals:
        told = distributed.StopSignal(signals)
        for step in range(10**6):
            ranks.sum(torch.ones(1))
            if step == 50 and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if told.agreed():
                print(f"rank {ranks.rank} stops at {step}", flush=True)
                return
            time.sleep(0.003 * ranks.rank)


def stop_early(ranks: Ranks) -> None:
    """One rank is told while nothing has begun, and the main process waits in a collective."""
    with Signals():
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        ranks.sum(torch.ones(1))


KINDS = {
    "kill": lambda ranks: kill(ranks, signal.SIGKILL),
    "suspend": lambda ranks: kill(ranks, signal.SIGSTOP),
    "raise": lambda ranks: fail(ranks, RuntimeError("out of luck")),
    "mistake": lambda ranks: fail(ranks, UserError("wrong path")),
    "mistake of all": lambda ranks: fail(ranks, UserError("wrong path"), (0, 1)),
    "slow main": slow_main,
    "fail on main": fail_on_main,
    "die on main": die_on_main,
    "mistake on main": mistake_on_main,
    "stop": stop,
    "stop early": stop_early,
    "end": lambda ranks: ranks.sum(torch.ones(1)),
}


def main() -> None:
    kind, minutes = sys.argv[1:]
    distributed.join(float(minutes))
    ranks = Ranks()
    print(f"rank {ranks.rank} pid {os.getpid()}", flush=True)
    KINDS[kind](ranks)


if __name__ == "__main__":
    cli.run(main)
