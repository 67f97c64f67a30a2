"""The one door to accelerate: processes, device, gradient synchronisation, reductions.

A plain `python` process is one rank; `accelerate launch` makes more, which watch each other
(utils/process/heartbeat.py). Automatic mixed precision is ours
(utils/training/trained_network.py), so accelerate's is switched off whatever its launch settings
say.
"""

import atexit
import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather,
    parse_flag_from_env,
    reduce,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models.checks.errors import UserError
from utils.precision import allow_tf32
from utils.process import heartbeat
from utils.process.ending import is_main, say
from utils.process.heartbeat import Heartbeat, Stopped
from utils.process.signals import Signals

T = TypeVar("T")
# Minutes that a rank waits in a collective for another. Work of the main process that may take
# longer (downloads, checkpoints) goes through `Ranks.on_main`, which waits for it without a limit.
RANK_TIMEOUT = 10.0
# What accelerate's launcher sets for ways of running that this code does not have.
OTHER_LAUNCHES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


class Ranks:
    """The processes that run one program, and what they do together.

    `rank` of `world` processes; `device` is where this one computes, CUDA or the CPU. With
    `distributed=False` this process is the only one, however it was launched.
    """

    def __init__(self, distributed: bool = True, device: torch.device | str | None = None):
        self.state = join() if distributed else None
        self.rank = self.state.process_index if self.state else 0
        self.world = self.state.num_processes if self.state else 1
        own = self.state.device if self.state else None
        self.device = torch.device(device or own or default_device())

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words) -> None:
        """Print on the main process alone."""
        if self.is_main:
            print(*words, flush=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return cast(Tensor, reduce(tensor, "sum")) if self.world > 1 else tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, D) of every rank => (world * B, D) in the order of ranks."""
        return cast(Tensor, gather(tensor.contiguous())) if self.world > 1 else tensor

    def wait(self) -> None:
        """Until every rank is here, however long that takes."""
        if self.world > 1 and heartbeat.current:
            heartbeat.current.meet()

    def on_main(self, function: Callable[[], T]) -> T:
        """The result of a call that the main process alone makes, on every rank; the others wait
        for it without a limit, but not for a process that died.

        If it fails with a `UserError` (or ends the program), the main process raises that. The
        others exit quietly with code 0: an error code would make the launcher kill the main process
        before it has printed its message. `Stopped` is raised on every rank.
        """
        value = problem = None
        if self.is_main:
            try:
                with uninterrupted():
                    value = function()
            except (UserError, SystemExit, Stopped) as error:
                problem = error
        if self.world > 1:
            self.wait()
            failed = "stopped" if isinstance(problem, Stopped) else problem is not None
            failed, value = broadcast_object_list([failed, value])
            if failed and problem is None:
                problem = Stopped() if failed == "stopped" else SystemExit(0)
        if problem is not None:
            raise problem
        return cast(T, value)

    def main_first(self, function: Callable[[], T]) -> T:
        """The result of a call that every rank makes, the main process first: it downloads, the
        others read its cache. Errors as in `on_main`."""
        own: list[T] = []
        self.on_main(lambda: own.append(function()))
        value = own[0] if own else function()
        self.wait()
        return value


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While this process does what must be finished although another rank is lost: saving."""
    watch = heartbeat.current
    if watch is None:
        yield
        return
    watch.busy += 1
    try:
        yield
    finally:
        watch.busy -= 1


def join(minutes: float = RANK_TIMEOUT) -> PartialState:
    """Join the other ranks, if any; a second call changes nothing. A rank that is not heard for
    `minutes` ends the program on every other one."""
    _refuse_other_launches()
    # the heartbeat, which knows names, is to be the first to notice
    limit = timedelta(minutes=minutes, seconds=10)
    try:
        state = PartialState(cpu=_on_cpu(), timeout=limit)
    except dist.DistError as error:
        text = f"not all {os.environ.get('WORLD_SIZE')} ranks could be joined: {error}"
        raise UserError(f"{text}; check the other ranks, MASTER_ADDR and MASTER_PORT") from error
    if state.num_processes > 1 and heartbeat.current is None:
        heartbeat.current = Heartbeat(
            state.process_index,
            state.num_processes,
            60 * minutes,
            f"{socket.gethostname()}, pid {os.getpid()}",
            _exchange,
            show=say,
        )
        atexit.register(_leave)
    return state


def _exchange(text: str) -> str:
    """Rank 0's text, on every rank, through the store in which the ranks found each other."""
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set("repa-e heartbeat", text)
    return store.get("repa-e heartbeat").decode()


def _leave() -> None:
    """At the end of a program that did not fail: the threads of a process group that is still there
    when Python ends can abort the process."""
    if heartbeat.current:
        heartbeat.current.leave()
    gc.collect()  # DDP's reducers wait for ever if they outlive their group
    if dist.is_initialized():
        dist.destroy_process_group()


def _refuse_other_launches() -> None:
    """`UserError` where accelerate's launcher was set up, by flags or by the user's own config
    file, for something else than plain data parallelism."""
    for variable, name in OTHER_LAUNCHES.items():
        if parse_flag_from_env(variable):
            raise UserError(
                f"the launcher is set up for {name} ({variable}), which this program does not use: "
                "start it with `accelerate launch --multi_gpu --num_processes N`, "
                "and a plain config (`accelerate config default`)"
            )


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU: Apple's mps has no float64, which statistics need."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        _say_that_mps_is_left_out()
    return torch.device("cpu")


@cache
def _say_that_mps_is_left_out() -> None:
    if is_main():
        say("note: this runs on the CPU: Apple's GPU (mps) has no float64, which statistics need")


def _on_cpu() -> bool:
    """Whether to run on the CPU; accelerate forms a group of CPU ranks only if it is asked to."""
    if "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        print(
            "warning: this is a single process: for N ranks on the CPU, accelerate needs "
            "`accelerate launch --multi_gpu --num_processes N` (with --cpu it needs MPI)",
            file=sys.stderr,
        )
    return parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu"


def start(
    run_dir: Path,
    trackers: list[str],
    tf32: bool,
    minutes: float = RANK_TIMEOUT,
    bucket_mb: int = 25,
) -> Accelerator:
    """`join` the other ranks, if any. Buffers are broadcast once, when a network is wrapped; from
    then on they are equal by construction. Gradients are averaged `bucket_mb` MiB at a time."""
    allow_tf32(tf32)
    join(minutes)
    accelerator = Accelerator(
        cpu=_on_cpu(),
        mixed_precision="no",
        log_with=[*trackers] or None,  # type: ignore[arg-type]
        project_config=ProjectConfiguration(logging_dir=str(run_dir / "tensorboard")),
        dynamo_backend="no",
    )
    # not by its argument kwargs_handlers, which takes no subclass
    accelerator.ddp_handler = _ddp_arguments(bucket_mb)  # type: ignore[assignment]
    return accelerator


@dataclass
class _SyncBuffersOnce(DistributedDataParallelKwargs):
    """With the argument of torch 2.13 that accelerate does not know yet."""

    forward_sync_buffers: bool = True


def _ddp_arguments(bucket_mb: int) -> DistributedDataParallelKwargs:
    """Of DDP; torch warns of its older argument where there is the new one."""
    how: dict[str, Any] = {"gradient_as_bucket_view": True, "bucket_cap_mb": bucket_mb}
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters:
        return _SyncBuffersOnce(forward_sync_buffers=False, **how)
    return DistributedDataParallelKwargs(broadcast_buffers=False, **how)


def launched_ranks() -> int:
    """Number of processes this one was launched with, without joining them (for --dry-run)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class StopSignal:
    """Whether the program was told to stop (`Signals`), so that it can save before it ends.

    A signal may reach ranks at different moments, and they must stop at the same place: `agreed`
    and `check_all` are called equally often and in the same order on every rank, without a cost
    while no signal came (`Heartbeat.stop_here`). `check` is for what one process does alone.
    """

    def __init__(self, signals: Signals):
        self.signals = signals
        signals.raises = False
        if heartbeat.current:
            heartbeat.current.told = lambda: signals.received

    @property
    def received(self) -> bool:
        """Whether this process was told, or heard that another one was."""
        return self.signals.received or bool(heartbeat.current and heartbeat.current.asked)

    def request(self) -> None:
        """Ask every rank to stop, as a signal does."""
        self.signals.received = True

    def agreed(self, step: int = 0) -> bool:
        """Whether the program stops here, after `step` steps; the same answer on every rank."""
        return heartbeat.current.stop_here() if heartbeat.current else self.signals.received

    def check(self) -> None:
        """Raise `Stopped` if told, on this rank alone."""
        if self.received:
            raise Stopped

    def check_all(self) -> None:
        """Raise `Stopped` if the program stops here, on every rank."""
        if self.agreed():
            raise Stopped
