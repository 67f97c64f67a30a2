"""docs/multi-node.md: its launch lines, tried with two "machines" of one CPU rank each, here.

python -m pytest tests/test_multi_node.py
"""

import os
import re
import shlex
import socket
import subprocess

import pytest

from tests.tiny import ROOT, TINY

PAGE = (ROOT / "docs" / "multi-node.md").read_text()
COMMANDS = re.findall(r"^ {4}((?:accelerate|torchrun|sbatch) .*)$", PAGE, re.M)
SCRIPT = "scripts/slurm/train.sbatch"
pytestmark = pytest.mark.slow


def command_of(page_line: str, node: int, port: int) -> list[str]:
    """A line of the page for two machines of one rank, both of which are this one."""
    line = page_line.replace("node1", "localhost").replace("29500", str(port))
    line = line.replace("--num_processes 16", "--num_processes 2")
    line = line.replace("--machine_rank 0", f"--machine_rank {node}")
    line = line.replace("--nproc-per-node 8", "--nproc-per-node 1")
    line = line.replace(f"sbatch --nodes 2 {SCRIPT}", f"bash {SCRIPT}")
    return shlex.split(line)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split()[0])
def test_two_machines_train_together(line, tmp_path, nothing_is_left):
    settings = [*TINY, f"run.out={tmp_path}", "run.steps=2"]
    port, launchers = free_port(), []
    for node in range(2):
        slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_NODEID": str(node)}
        slurm |= {"MASTER_PORT": str(port), "LAUNCH": "env"}
        words = command_of(line, node, port)
        config = words.index("--config")
        launchers.append(
            subprocess.Popen(
                [*words[:config], *settings],
                cwd=ROOT,
                env=os.environ | slurm | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    printed = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], printed
    assert (tmp_path / "tiny" / "checkpoints" / "0000002").is_dir(), printed
    assert (tmp_path / "tiny" / "metrics.jsonl").is_file()


def test_the_page_has_one_line_for_each_launcher():
    assert [line.split()[0] for line in COMMANDS] == ["accelerate", "torchrun", "sbatch"]
