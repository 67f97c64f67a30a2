"""The one door to accelerate: processes, device, gradient synchronisation, reductions.

A plain `python` process is one rank; `accelerate launch` makes more. Automatic mixed precision is
ours (utils/learner.py), so accelerate's is switched off whatever its launch settings say.
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
    parse_flag_from_env,
)

from models.errors import UserError

# How long a rank waits for another: NCCL's 10 minutes are less than a download, a checkpoint on
# slow storage, or the last rank's share of 50,000 samples can take.
PATIENCE = timedelta(hours=6)


def join() -> PartialState:
    """Join the other ranks, if any: rank facts and device, for scripts that train nothing."""
    return PartialState(cpu=_on_cpu(), timeout=PATIENCE)


def allow_tf32(allowed: bool) -> None:
    """TF32 in float32 matrix products and convolutions, on GPUs that have it."""
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        backend.fp32_precision = "tf32" if allowed else "ieee"


def main_first(state: PartialState, function: Callable, share: bool = False):
    """`function()` on every rank, on the main process first; with `share`, on that alone, and its
    value on every rank. If it fails there, every rank ends: the main process with the error, the
    others in silence, with exit code 0 so that no launcher kills the one that is about to speak."""
    value = problem = None
    if state.is_main_process:
        try:
            value = function()
        except (UserError, SystemExit) as error:
            problem = error
    failed, shared = broadcast_object_list([problem is not None, value if share else None])
    if failed:
        raise problem or SystemExit(0)
    if share:
        return shared
    return value if state.is_main_process else function()


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
            InitProcessGroupKwargs(timeout=PATIENCE),
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
