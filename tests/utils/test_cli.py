"""The frame around the scripts: who answers, and how."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from models.checks.errors import UserError
from utils import cli
from utils.process.ending import say
from utils.process.heartbeat import NOTHING_TO_SAVE
from utils.process.signals import SIGNALS
from utils.process.written import SAMPLES

ROOT = Path(__file__).resolve().parents[2]


def refuse():
    raise UserError("--steps 0 must be\n at least 1")


def parse_help():
    cli.Parser("What it does.").parse_args(["--help"])


@pytest.mark.parametrize(("rank", "code"), [(None, 2), ("0", 2), ("1", 0)])
def test_of_several_ranks_one_says_what_is_wrong(rank, code, monkeypatch, capsys):
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        cli.answer_help(refuse)
    said = capsys.readouterr().err
    assert end.value.code == code
    assert said == ("" if code == 0 else "error: --steps 0 must be at least 1\n")


def test_of_several_ranks_one_prints_the_help(monkeypatch, capsys):
    for rank, text in (("0", "What it does."), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            cli.answer_help(parse_help)
        assert end.value.code == 0 and text in capsys.readouterr().out


def test_every_default_is_shown_zero_included(capsys):
    parser = cli.Parser("What it does.\n\n    python script.py --steps 3")
    parser.add_argument("--steps", type=int, default=0, help="number of steps")
    parser.add_argument("--quiet", action="store_true", help="say less")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "number of steps (default: 0)" in said and "python script.py --steps 3" in said
    assert "say less (default" not in said


FRAME = """
import os, signal, sys, time
from utils import cli
from utils.process.signals import Signals

def main():
    {}

cli.run(main)
"""
BODY = """with Signals() as signals:
        signals.raises = {raises}
        print("ready", flush=True)
        {then}
        print("received", signals.received)"""
# waits for a lock in C, which no handler interrupts
HANG = """import ctypes
        lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(99)
        lock(mutex), lock(mutex)"""
WAIT = """end = time.monotonic() + 20
        while time.monotonic() < end and not signals.received: time.sleep(.01)"""


def begin(body: str) -> subprocess.Popen:
    """A script of this body, in a new process that imports nothing slow."""
    words = [sys.executable, "-c", FRAME.format(body)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def signalled(body: str, *numbers: int, pause: float = 0.4) -> tuple[int, str, str]:
    """How a script ends to which signals are sent: exit code, stdout, stderr."""
    process = begin(body)
    process.stdout.readline()
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause)
    out, errors = process.communicate(timeout=30)
    return process.returncode, out, errors


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_while_there_is_something_to_save(number):
    code, out, errors = signalled(BODY.format(raises=False, then=WAIT), number)
    assert (code, out.strip(), errors) == (0, "received True", "")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("then", ["time.sleep(20)", HANG])
def test_a_signal_ends_at_once_what_has_nothing_to_save(number, then):
    """Also if the main thread waits in C."""
    before = time.monotonic()
    code, _, errors = signalled(BODY.format(raises=True, then=then), number)
    assert code == 0 and time.monotonic() - before < 15
    assert errors.splitlines() == [NOTHING_TO_SAVE]


def test_a_second_ctrl_c_ends_at_once():
    body = BODY.format(raises=False, then="time.sleep(20); time.sleep(20)")
    code, out, errors = signalled(body, signal.SIGINT, signal.SIGINT, pause=1.5)
    assert code == 130 and "received" not in out and "Traceback" not in errors


def test_ctrl_c_in_a_script_that_saves_nothing_is_one_line():
    code, _, errors = signalled("print('ready', flush=True); time.sleep(20)", signal.SIGINT)
    assert (code, errors) == (130, "interrupted\n")


def test_the_reader_of_a_pipe_may_leave():
    process = begin("for i in range(10**5): print(i)")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(30)


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device", "x.npz"), PermissionError(13, "denied", "x")],
)
def test_a_disk_that_is_full_or_closed_is_one_line(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: x") and error.strerror in line


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def test_a_message_stands_on_a_line_of_its_own_beside_a_progress_bar(capsys):
    with tqdm(total=3) as bar:
        bar.update()
        say("error: no such file")
    assert "error: no such file" in capsys.readouterr().err.splitlines()


NO_NUMBERS = ["0", "-1", "1.5", "nan", "inf", "-inf", "", "x"]


@pytest.mark.parametrize("text", [*NO_NUMBERS, "1e300", "9" * 30])
def test_a_number_out_of_range_is_refused_with_its_flag(text):
    real = [cli.number(float, at_least=2)] if text in NO_NUMBERS else []  # those two are finite
    for kind in (cli.positive, cli.number(int, at_least=1), *real):
        parser = cli.Parser()
        parser.add_argument("--num", type=kind)
        with pytest.raises(UserError, match="--num"):
            parser.parse_args([f"--num={text}"])


def test_numbers_are_read_as_people_write_them():
    assert cli.positive("1e3") == 1000 and isinstance(cli.positive("1e3"), int)
    assert cli.not_negative("0") == 0 and cli.number(float, above=0)("1e-3") == 1e-3
    big = 2**53 + 1  # no float
    assert cli.positive(str(big)) == big


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "fifo.npz")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "link.npz").symlink_to(tmp_path / "nothing")
    places = ["link.npz", "folder.npz", "fifo.npz", "file/a.npz", "loop/a.npz", f"{'a' * 250}.npz"]
    for name in [*places, "a.png", "npz", ".npz"]:
        with pytest.raises(UserError, match="--out"):
            cli.check_output("--out", tmp_path / name, SAMPLES)
    before = sorted(tmp_path.rglob("*"))
    cli.check_output("--out", tmp_path / "new" / "folder" / "a.npz", SAMPLES)
    cli.check_output_folder("--out", tmp_path / "new" / "folder")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="no folder"):
        cli.check_output_folder("--out", tmp_path / "file")


def test_an_output_is_no_input_under_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = tmp_path / "in.npz"
    given.touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "soft.npz").symlink_to(given)
    (tmp_path / "hard.npz").hardlink_to(given)
    for name in ("in.npz", "sub/../in.npz", "soft.npz", "hard.npz", str(given)):
        with pytest.raises(UserError, match="an input: choose another name"):
            cli.check_output("--out", Path(name), SAMPLES, inputs=[None, given])


def test_nothing_is_written_into_an_input_folder(tmp_path):
    """A picture there would be trained on. A run takes new files, but not among its checkpoints."""
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data/b").symlink_to(tmp_path)
    for place in ("data/new.npz", "data/a/b/new.npz", "link/a/new.npz", "data/b/new.npz"):
        with pytest.raises(UserError, match="lies inside the input"):
            cli.check_output("--out", tmp_path / place, SAMPLES, inputs=[tmp_path / "data"])
    for place in ("data", "data/a", "link/new"):
        with pytest.raises(UserError, match=r"an input|lies inside the input"):
            cli.check_output_folder("--out", tmp_path / place, inputs=[tmp_path / "data"])
    cli.check_output("--out", tmp_path / "data2/new.npz", SAMPLES, inputs=[tmp_path / "data"])
    (tmp_path / "data/config.yaml").touch()
    (tmp_path / "data/checkpoints/0000002").mkdir(parents=True)
    cli.check_output("--out", tmp_path / "data/new.npz", SAMPLES, inputs=[tmp_path / "data"])
    place = tmp_path / "data/checkpoints/0000002/new.npz"
    with pytest.raises(UserError, match="lies inside the input"):
        cli.check_output("--out", place, SAMPLES, inputs=[tmp_path / "data"])


def test_a_folder_is_named_as_the_user_wrote_it(tmp_path):
    """Without the name of a file that would be in it, and "." has a name."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=rf"^--out {tmp_path}/taken: "):
        cli.check_output_folder("--out", tmp_path / "taken")
    assert cli.file_path(".") == Path.cwd() and cli.file_path("a/b") == Path("a/b")


def test_an_input_that_is_absent_and_one_that_is_something_else_are_two_messages(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="no such file"):
        cli.check_input("--in", tmp_path / "absent")
    for name, kind in (("fifo", "a FIFO"), (".", "a folder")):
        with pytest.raises(UserError, match=kind):
            cli.check_input("--in", tmp_path / name)
    cli.check_input("--in", tmp_path, folder=True)
    cli.check_input("--in", None)
