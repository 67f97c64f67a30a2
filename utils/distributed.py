"""The one door to accelerate: processes, device, gradient synchronisation, reductions.

A plain `python` process is one rank; `accelerate launch` makes more. Automatic mixed precision is
ours (utils/training/trained_network.py), so accelerate's is switched off whatever its launch
settings say.
"""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather,
    parse_flag_from_env,
    reduce,
)

from models.errors import UserError
from utils.precision import allow_tf32

# How long a rank waits for another: NCCL's 10 minutes are less than a download, a checkpoint on
# slow storage, or the last rank's share of 50,000 samples can take.
TIMEOUT = timedelta(hours=6)


class Ranks:
    """The processes that run one program, and what they do together.

    `rank` of `world` processes; `device` is where this one computes, CUDA or the CPU. With
    `distributed=False` this process is the only one, however it was launched.
    """

    def __init__(self, distributed: bool = True, device: torch.device | str | None = None):
        self.state = PartialState(cpu=_on_cpu(), timeout=TIMEOUT) if distributed else None
        self.rank = self.state.process_index if self.state else 0
        self.world = self.state.num_processes if self.state else 1
        self.device = torch.device(
            device or (self.state.device if self.state else default_device())
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words) -> None:
        """Print on the main process alone."""
        if self.is_main:
            print(*words, flush=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return reduce(tensor, "sum") if self.world > 1 else tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, D) of every rank => (world * B, D) in the order of ranks."""
        return gather(tensor.contiguous()) if self.world > 1 else tensor

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            self.state.wait_for_everyone()

    def on_main(self, function: Callable):
        """The result of a call that the main process alone makes, on every rank.

        If it fails with a `UserError` (or ends the program), the main process raises that. The
        others exit quietly with code 0: an error code would make the launcher kill the main process
        before it has printed its message.
        """
        value = problem = None
        if self.is_main:
            try:
                value = function()
            except (UserError, SystemExit) as error:
                problem = error
        if self.world > 1:
            failed, value = broadcast_object_list([problem is not None, value])
            problem = problem or (SystemExit(0) if failed else None)
        if problem is not None:
            raise problem
        return value

    def main_first(self, function: Callable):
        """The result of a call that every rank makes, the main process first: it downloads, the
        others read its cache. Errors as in `on_main`."""
        own = []
        self.on_main(lambda: own.append(function()))
        return own[0] if own else function()


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU: Apple's mps has no float64, which statistics need."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _on_cpu() -> bool:
    """Whether to run on the CPU; accelerate forms a group of CPU ranks only if it is asked to."""
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        print(
            "warning: this is a single process: for N ranks on the CPU, accelerate needs "
            "`accelerate launch --multi_gpu --num_processes N` (with --cpu it needs MPI)",
            file=sys.stderr,
        )
    return parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu"


def start(run_dir: Path, trackers: list[str], tf32: bool) -> Accelerator:
    """Join the other ranks, if any. Buffers are broadcast once, when a network is wrapped; from
    then on they are equal by construction."""
    allow_tf32(tf32)
    return Accelerator(
        cpu=_on_cpu(),
        mixed_precision="no",
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir=str(run_dir / "tensorboard")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=TIMEOUT),
        ],
        dynamo_backend="no",
    )


def launched_ranks() -> int:
    """Number of processes this one was launched with, without joining them (for --dry-run)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class StopSignal:
    """Remembers SIGTERM and SIGUSR1, so that the loop can save before it ends.

    A signal may reach ranks at different moments, and they must stop at the same step: they vote.
    A vote waits for the GPU, so with several ranks it is taken only every `POLL_EVERY` steps.
    """

    POLL_EVERY = 10

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.received = accelerator, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.received = True

    def agreed(self, step: int) -> bool:
        """Whether any rank received a signal; the same answer on every rank."""
        if self.accelerator.num_processes == 1:
            return self.received
        if step % self.POLL_EVERY:
            return False
        vote = torch.tensor(float(self.received), device=self.accelerator.device)
        return self.accelerator.reduce(vote, "sum").item() > 0
