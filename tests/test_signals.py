"""A signal saves and stops the run: to one process, to its group, to the launcher.

python -m pytest tests/test_signals.py
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import ROOT, TINY, launcher
from utils.checkpoint import find_fault
from utils.process.heartbeat import NOTHING_TO_SAVE
from utils.training.tracking import read_metrics

LONG = ("run.steps=100000", "run.save_every=100000", "run.log_every=1")
FORKSERVER = """
import multiprocessing, sys
sys.path.insert(0, ".")
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    import train_repae
    from utils import cli
    cli.run(train_repae.main)
"""
PATIENCE = 240  # s for what takes some 10 s: a start, or to save and end
SLOW = pytest.mark.slow
pytestmark = [
    pytest.mark.usefixtures("nothing_is_left"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


class Run:
    """`train_repae.py`, perhaps under a launcher, in a process group of its own."""

    def __init__(self, out: Path, *overrides: str, ranks: int = 1, method: str = "fork"):
        self.out, script = out, Path("train_repae.py")
        if method == "forkserver":
            script = out / "forkserver.py"
            script.write_text(FORKSERVER)
        words = [*launcher(ranks), str(script), *TINY, f"run.out={out}", *LONG, *overrides]
        env = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with (out / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=os.environ | env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return (self.out / "log").read_text()

    def children(self) -> list[int]:
        """Of a launcher: its ranks; of one process: its workers, or the server of those."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted(int(word) for task in tasks for word in task.read_text().split())

    def wait_until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log
            time.sleep(0.02)

    def wait_for_steps(self, steps: int = 1) -> None:
        path = self.out / "tiny" / "metrics.jsonl"
        self.wait_until(lambda: path.is_file() and len(read_metrics(path)) >= steps)

    def send(self, number: int, receiver: str) -> None:
        if receiver == "group":
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.children()[-1] if receiver == "rank" else self.process.pid, number)

    def end(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE)

    def require_saved(self) -> None:
        """One whole checkpoint, of the step in the last line."""
        (checkpoint,) = (self.out / "tiny" / "checkpoints").glob("[0-9]*")
        assert find_fault(checkpoint) is None
        assert f"told to stop at step {int(checkpoint.name)};" in self.log
        assert str(checkpoint) in self.log


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for somebody to ask for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("number", "receiver", "method", "workers"),
    [
        pytest.param(signal.SIGTERM, "group", "fork", 2, marks=SLOW),
        pytest.param(signal.SIGINT, "group", "fork", 2, marks=SLOW),  # Ctrl-C
        pytest.param(signal.SIGUSR1, "group", "forkserver", 2, marks=SLOW),
        pytest.param(signal.SIGTERM, "process", "forkserver", 2, marks=SLOW),
        pytest.param(signal.SIGUSR1, "process", "fork", 0, marks=SLOW),
    ],
)
def test_a_signal_leaves_workers_alone_until_the_run_has_saved(
    tmp_path, number, receiver, method, workers
):
    run = Run(tmp_path, f"data.workers={workers}", method=method)
    run.wait_for_steps()
    run.send(number, receiver)
    assert run.end() == 0, run.log
    run.require_saved()


@SLOW
@pytest.mark.parametrize(
    ("number", "method"), [(signal.SIGTERM, "fork"), (signal.SIGINT, "forkserver")]
)
def test_a_signal_to_the_group_as_workers_start(tmp_path, number, method):
    """Whether or not there has been a step, the program ends as one line says."""
    run = Run(tmp_path, "data.workers=2", method=method)
    # the imports of torch start a process, too
    run.wait_until(lambda: "starting a new run" in run.log and run.children())
    run.send(number, "group")
    assert run.end() == 0, run.log
    assert "Traceback" not in run.log
    if "told to stop" in run.log:
        run.require_saved()
    else:
        assert NOTHING_TO_SAVE in run.log


@SLOW
@pytest.mark.parametrize(
    ("number", "receiver", "workers"),
    [
        (signal.SIGTERM, "launcher", 2),
        (signal.SIGINT, "launcher", 0),
        (signal.SIGKILL, "launcher", 2),
        (signal.SIGUSR1, "rank", 0),
    ],
)
def test_two_ranks_save_once_and_stop_at_one_step(tmp_path, number, receiver, workers):
    """Also after the launcher has ended: its ranks may still be saving."""
    run = Run(tmp_path, f"data.workers={workers}", ranks=2)
    run.wait_for_steps()
    ranks = run.children()
    assert len(ranks) == 2
    run.send(number, receiver)
    assert (run.end() == 0) == (receiver == "rank"), run.log
    end = time.monotonic() + PATIENCE
    while not all(map(has_ended, ranks)):
        assert time.monotonic() < end, run.log
        time.sleep(0.1)
    run.require_saved()


@SLOW
@pytest.mark.parametrize("what", ["preview", "evaluation"])
def test_a_signal_ends_a_long_preview_or_evaluation(tmp_path, what):
    """Which would take hours; what the step has learnt is saved."""
    tasks = {
        "preview": ("preview.every=2", "preview.num=4000", "preview.steps=1000"),
        "evaluation": ("eval.every=2", "eval.num=4000", "eval.steps=1000", "eval.batch_size=2",
                       "eval.features=pixel", "eval.metrics=[fid]"),
    }  # fmt: skip
    run = Run(tmp_path, *tasks[what])
    run.wait_for_steps(2)
    time.sleep(2)  # the line of step 2 was written just before; there is no step 3
    run.send(signal.SIGTERM, "process")
    assert run.end() == 0, run.log
    run.require_saved()
    assert [row["step"] for row in read_metrics(tmp_path / "tiny" / "metrics.jsonl")] == [1, 2]
