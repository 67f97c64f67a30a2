"""A long run needs no more at its end than at its start: memory, open files, threads.

python -m pytest tests/test_long_run.py -m slow
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import timm
from safetensors.torch import save_file

from tests.tiny import ROOT, TINY
from utils.training.tracking import read_metrics

STEPS, SETTLED = 2000, 300
LONG = (
    *(f"run.steps={STEPS}", "run.log_every=20", "run.save_every=250", "run.keep_last=2"),
    *("run.milestone_every=0", "run.trackers=[tensorboard]", "data.workers=2", "ema.warmup=true"),
    *("preview.every=500", "preview.num=8", "preview.steps=2"),
    *("eval.every=250", "eval.num=24", "eval.steps=2"),
)
# Memory of the main process may move by the size of a batch of images in a cache of the allocator,
# and by one evaluation; what leaks even 16 KiB a step (one image of the batch) adds 27 MiB.
RSS_MIB = 16.0
# A worker is a fork: pages that it shares become its own when Python counts references in them.
WORKER_RSS_MIB = 16.0


def measure(pid: int) -> dict[str, float]:
    """Resident memory in MiB, open files and threads of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "rss": int(status["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def children(pid: int) -> list[int]:
    """The processes that a process has started, in the order of their ids."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sorted(int(c) for task in tasks for c in (task / "children").read_text().split())


def watch(process: subprocess.Popen, metrics: Path) -> list[tuple[int, list[dict[str, float]]]]:
    """[(step, figures of the main process and its workers)], one for each log line, soon after it
    was written, until the process ends."""
    samples: list[tuple[int, list[dict[str, float]]]] = []
    while process.poll() is None:
        time.sleep(0.05)
        rows = read_metrics(metrics) if metrics.is_file() else []
        step = int(rows[-1]["step"]) if rows else 0
        if step and (not samples or step > samples[-1][0]):
            try:
                pids = [process.pid, *children(process.pid)]
                samples.append((step, [measure(pid) for pid in pids]))
            except OSError:  # it has just ended
                continue
    return samples


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_open_files_and_threads_are_flat(tmp_path):
    """2,000 steps with two loader workers, alignment, checkpoints, previews and evaluations; what
    is measured from step 300 to 1,000 is compared with what is from 1,300 to the end."""
    judge = tmp_path / "judge.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), judge)
    words = (*TINY, *LONG, f"run.out={tmp_path}", f"eval.features=timm:test_resnet@{judge}")
    command = [sys.executable, "train_repae.py", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
        try:
            samples = watch(process, tmp_path / "tiny" / "metrics.jsonl")
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, (tmp_path / "output.txt").read_text()[-2000:]
    early = [figures for step, figures in samples if SETTLED <= step <= 1000]
    late = [figures for step, figures in samples if 1300 <= step < STEPS]
    assert len(early) > 10 and len(late) > 10
    assert {len(figures) for figures in (*early, *late)} == {len(early[0])}
    for number in range(len(early[0])):
        before, after = ([figures[number] for figures in part] for part in (early, late))
        for name in ("files", "threads"):  # a file may just be open for a checkpoint or a log line
            assert median(f[name] for f in after) <= median(f[name] for f in before), (number, name)
        growth = median(f["rss"] for f in after) - median(f["rss"] for f in before)
        assert growth < (WORKER_RSS_MIB if number else RSS_MIB), (number, growth)
    rows = read_metrics(tmp_path / "tiny" / "metrics.jsonl")
    assert sum(any(k.startswith("eval/") for k in row) for row in rows) == STEPS // 250
