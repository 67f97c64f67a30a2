"""The one door to accelerate: processes, device, gradient synchronisation, reductions.

A plain `python` process is one rank; `accelerate launch` makes more. Automatic mixed precision is
ours (utils/learner.py), so accelerate's is switched off whatever its launch settings say.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)


def join() -> PartialState:
    """Join the other ranks, if any: rank facts and device, for scripts that train nothing."""
    return PartialState(cpu=_on_cpu())


def _on_cpu() -> bool:
    """Whether to run on the CPU. Without being told, accelerate forms no group of CPU ranks."""
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        print(
            "warning: this is a single process: for N ranks on the CPU, accelerate needs "
            "`accelerate launch --multi_gpu --num_processes N` (with --cpu it needs MPI)",
            file=sys.stderr,
        )
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def start(run_dir: Path, trackers: list[str], tf32: bool) -> Accelerator:
    """Join the other ranks, if any. Buffers are never broadcast: ours are equal by construction."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return Accelerator(
        cpu=_on_cpu(),
        mixed_precision="no",
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir=str(run_dir / "tensorboard")),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
        dynamo_backend="no",
    )


def launched_ranks() -> int:
    """Number of processes this one was launched with, without joining them (for --dry-run)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class StopSignal:
    """Remembers SIGTERM and SIGUSR1, so that the loop can save before it ends.

    Ranks may be told at different moments, and must stop at the same step: they vote, and because
    a vote waits for the GPU it is taken only every `POLL_EVERY` steps when there are several.
    """

    POLL_EVERY = 10

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.told = accelerator, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.told = True

    def agreed(self, step: int) -> bool:
        """Whether any rank was told to stop; the same answer on every rank."""
        if self.accelerator.num_processes == 1:
            return self.told
        if step % self.POLL_EVERY:
            return False
        vote = torch.tensor(float(self.told), device=self.accelerator.device)
        return self.accelerator.reduce(vote, "sum").item() > 0
