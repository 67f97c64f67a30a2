"""One rank dies, hangs, fails or is told to stop: what the others do.

python -m pytest tests/test_ranks.py
"""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.tiny import ROOT, run_script

SLOW = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("nothing_is_left")


def start(kind: str) -> list[subprocess.Popen]:
    """Two ranks of tests/ranks_program.py, without a launcher that would end the other one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # that a rank may be silent; a busy machine takes its time to start them
    minutes = "0.1" if kind in ("suspend", "slow main") else "2"
    words = [sys.executable, "tests/ranks_program.py", kind, minutes]
    return [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env=env | {"RANK": rank, "LOCAL_RANK": rank},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    out, errors = process.communicate(timeout=240)
    return process.returncode, out, errors


LOST = {
    "kill": (1, "rank 1 .*pid {}.* ended"),
    "suspend": (1, "rank 1 .*pid {}.* has not answered for 6 s"),
    "raise": (1, "rank 1 .*pid {}.* failed: RuntimeError: out of luck"),
    "die on main": (0, "rank 0 .*pid {}.* ended"),
    "fail on main": (0, "rank 0 .*pid {}.* failed: RuntimeError: no weights"),
    "slow main": (0, "rank 0 .*pid {}.* failed: RuntimeError: no weights"),  # after 18 s of work
}


@pytest.mark.parametrize("kind", ["kill", *(pytest.param(k, marks=SLOW) for k in [*LOST][1:])])
def test_the_loss_of_a_rank_ends_the_other_with_one_line_that_names_it(kind):
    ranks = start(kind)
    lost, line = LOST[kind]
    code, _, errors = end(ranks[1 - lost])
    if kind == "suspend":
        ranks[lost].send_signal(signal.SIGKILL)
    _, out, own = end(ranks[lost])
    pid = re.search(rf"rank {lost} pid (\d+)", out)[1]
    assert code == 1
    (said,) = errors.splitlines()
    assert re.search(line.format(pid), said)
    assert ("Traceback" in own) == ("failed" in line)  # it is a fault of ours, and shown once


@SLOW
@pytest.mark.parametrize("kind", ["mistake", "mistake of all", "mistake on main"])
def test_a_mistake_of_the_user_is_printed_once(kind):
    found = [end(rank) for rank in start(kind)]
    assert [code for code, _, _ in found] == [2, 0]
    assert len("".join(errors for _, _, errors in found).splitlines()) == 1
    assert found[0][2].startswith("error: ")


@SLOW
def test_a_signal_to_one_rank_stops_all_at_the_same_step():
    found = [end(rank) for rank in start("stop")]
    assert [code for code, _, _ in found] == [0, 0]
    first, second = (re.search(r"stops at (\d+)", out)[1] for _, out, _ in found)
    assert first == second and int(first) >= 50


@SLOW
def test_a_signal_before_the_first_step_ends_all_ranks_with_one_line():
    found = [end(rank) for rank in start("stop early")]
    assert [code for code, _, _ in found] == [0, 0]
    (line,) = "".join(errors for _, _, errors in found).splitlines()
    assert "nothing new to save" in line


@SLOW
def test_programs_that_ended_well_do_not_abort():
    """The process group is destroyed before Python ends its threads; several at once, so that each
    is held up."""
    programs = [start("end") for _ in range(4)]
    assert [[end(rank)[0] for rank in ranks] for ranks in programs] == 4 * [[0, 0]]


@SLOW
def test_a_launcher_set_up_for_something_else_is_refused_once(monkeypatch):
    """Before the ranks wait for each other, and by one of them."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    done = run_script("tests/ranks_program.py", "end", "2", ranks=2)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "FSDP" in line and "accelerate launch --multi_gpu" in line
