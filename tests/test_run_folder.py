"""A run's folder: one writer, a disk that is full, a folder that is gone, what a kill cuts off.

python -m pytest tests/test_run_folder.py
"""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from models.checks.errors import UserError
from tests.tiny import ROOT, train_here
from utils.checkpoint import Checkpoints
from utils.files import HashedFile
from utils.run_lock import RunLock
from utils.sealed import find_fault
from utils.training import periodic, tracking
from utils.training.tracking import read_metrics

SMALL = ("run.save_every=1", "run.log_every=1", "run.steps=3", "run.disk_wait=0.002")


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of everything in a folder."""
    stats = {str(p.relative_to(folder)): p.lstat() for p in folder.rglob("*")}
    return {name: (s.st_mtime_ns, s.st_size) for name, s in stats.items()}


def checkpoints(out: Path) -> list[str]:
    return sorted(os.listdir(out / "tiny" / "checkpoints"))


# --------------------------------------------------------------------------------------
# One writer.


def test_a_second_run_is_refused_and_nothing_is_touched(tmp_path, capsys):
    assert train_here(tmp_path, "run.steps=2") == 0
    assert not (tmp_path / "tiny" / ".lock").exists()
    with RunLock(tmp_path / "tiny") as lock:
        lock.acquire()
        before = tree(tmp_path)
        assert train_here(tmp_path, "run.steps=4") == 2
        assert tree(tmp_path) == before
    error = capsys.readouterr().err
    assert f"process {os.getpid()} on {socket.gethostname()}" in error
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "samples/0000009.png"])
def test_a_folder_of_another_program_is_no_run(name, tmp_path, capsys):
    """Also of one whose runs look much the same; files that a run does not write may lie there."""
    file = tmp_path / "tiny" / name
    file.parent.mkdir(parents=True)
    file.write_text("lr: 1\n")
    (tmp_path / "tiny/encoder.safetensors").touch()
    before = tree(tmp_path)
    assert train_here(tmp_path) == 2
    assert f"holds {name.split('/')[0]}, and is no run" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_new_run_does_not_lie_inside_its_data(tmp_path, capsys):
    """Its pictures would be trained on."""
    (tmp_path / "a").mkdir()
    assert train_here(tmp_path / "exps", "data.source=folder", f"data.path={tmp_path}") == 2
    assert f"lies inside the input {tmp_path}" in capsys.readouterr().err


def test_a_run_that_is_refused_makes_no_folder(tmp_path):
    assert train_here(tmp_path / "out", "run.batch_size=100000") == 2
    assert not (tmp_path / "out").exists()


def test_the_lock_of_another_host_is_respected_and_says_what_to_delete(tmp_path):
    file = tmp_path / ".lock"
    file.write_text(json.dumps({"host": "node7", "pid": 12, "started": "2026-01-02 03:04:05"}))
    with pytest.raises(
        UserError, match=r"process 12 on node7, started 2026-01-02 03:04:05"
    ) as info:
        RunLock(tmp_path).acquire()
    assert f"delete {file}" in str(info.value)
    file.unlink()
    with RunLock(tmp_path) as lock:
        lock.acquire()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from utils.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
if os.fork() == 0:  # a loader worker, which ends a little later
    time.sleep(1)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_lock_of_a_killed_run_is_taken_over_also_from_its_workers(tmp_path, capsys):
    run = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", KILLED, run], cwd=ROOT, check=False)
    assert killed.returncode == -9 and (run / ".lock").exists()
    with RunLock(run) as lock:
        lock.acquire()
        (line,) = capsys.readouterr().out.splitlines()
        assert str(run / ".lock") in line
        with pytest.raises(UserError, match="is written by"):
            RunLock(run).acquire()
    assert not run.exists()  # nothing else was in it


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"host": 3}', b"[" * 9999])
def test_a_lock_file_that_nobody_has_signed_is_free(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("obstacle", ["a folder", "a FIFO", "a link", "a file above"])
def test_where_no_lock_can_be_is_said(tmp_path, obstacle):
    run = tmp_path / "run"
    if obstacle == "a file above":
        run.write_text("x")
        run = run / "tiny"
    else:
        run.mkdir()
        (tmp_path / "precious").write_text("x")
        make = {"a folder": os.mkdir, "a FIFO": os.mkfifo}
        make.get(obstacle, lambda path: os.symlink(tmp_path / "precious", path))(run / ".lock")
    with pytest.raises(UserError, match="cannot write in"):
        RunLock(run).acquire()
    assert obstacle != "a link" or (tmp_path / "precious").read_text() == "x"


def test_a_lock_that_was_deleted_is_taken_again_unless_another_run_has_come(tmp_path):
    run = tmp_path / "out" / "run"
    with RunLock(run) as lock:
        lock.acquire()
        shutil.rmtree(run)
        lock.renew()
        assert (run / ".lock").exists()
        (run / ".lock").unlink()
        with RunLock(run) as other:
            other.acquire()
            with pytest.raises(OSError, match="is written by"):
                lock.renew()
        shutil.rmtree(run.parent)  # a disk that has gone: no folder is made in its place
        with pytest.raises(OSError):
            lock.renew()
        assert not run.parent.exists()


def test_what_another_run_wrote_between_the_checks_and_the_lock_is_compared(
    tmp_path, monkeypatch, capsys
):
    """Two runs with different seeds start at once; one ends before the other has the lock."""
    acquire, others = RunLock.acquire, [1]

    def after_another(lock):
        if others.pop() if others else None:
            assert train_here(tmp_path, *SMALL, "run.seed=1", "run.steps=1") == 0
        acquire(lock)

    monkeypatch.setattr(RunLock, "acquire", after_another)
    assert train_here(tmp_path, *SMALL, "run.steps=2") == 2
    assert "run.seed=1 (now 0)" in capsys.readouterr().err
    assert checkpoints(tmp_path) == ["0000001"]


# --------------------------------------------------------------------------------------
# A disk that is full.


class FullDisk:
    """Writes of weights fail while `full` is set."""

    def __init__(self, monkeypatch):
        self.full, write = True, HashedFile.write

        def guarded(file, content):
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.file.name))
            return write(file, content)

        monkeypatch.setattr(HashedFile, "write", guarded)


def test_a_save_or_a_log_line_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    disk, run, sync = FullDisk(monkeypatch), tmp_path / "tiny", tracking.Tracker.sync

    def change(tracker):  # what was wrong at steps 1 and 2 is over at step 3
        disk.full = (
            len(read_metrics(run / "metrics.jsonl")) < 2 and (run / "metrics.jsonl").is_file()
        )
        sync(tracker)

    monkeypatch.setattr(tracking.Tracker, "sync", change)
    real = tracking.save_picture
    pictures = []

    def save_picture(path, *rest):
        pictures.append(path.name)
        if len(pictures) <= 2:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        real(path, *rest)

    monkeypatch.setattr(tracking, "save_picture", save_picture)
    previews = ("preview.every=1", "preview.num=2", "preview.steps=2")
    assert train_here(tmp_path, *SMALL, *previews) == 0
    error = capsys.readouterr().err
    assert checkpoints(tmp_path) == ["0000002", "0000003"] and "Traceback" not in error
    assert error.count("step 1 could not be saved (No space left on device") == 1
    assert error.count("pictures not written (Read-only file system") == 1
    assert sorted(os.listdir(run / "samples"))[-1] == "0000003.png"
    assert find_fault(run / "checkpoints" / "0000003") is None


@pytest.mark.slow
def test_the_end_waits_for_room_and_then_fails_in_one_line(tmp_path, monkeypatch, capsys):
    assert train_here(tmp_path, *SMALL, "run.steps=1") == 0
    disk = FullDisk(monkeypatch)
    monkeypatch.setattr(periodic, "RETRY", 0.05)
    assert train_here(tmp_path, *SMALL, "run.steps=2") == 1
    error = capsys.readouterr().err
    assert "waiting up to" in error and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("stopped: ")]
    assert "step 2 could not be saved" in line and "0000001" in line
    assert checkpoints(tmp_path) == ["0000001"]

    def sleep(seconds):  # somebody makes room
        disk.full = False

    monkeypatch.setattr(periodic.time, "sleep", sleep)
    assert train_here(tmp_path, *SMALL, "run.steps=2") == 0
    assert checkpoints(tmp_path) == ["0000001", "0000002"]


@pytest.mark.slow
def test_a_folder_that_is_deleted_while_the_run_goes_on_is_made_again(tmp_path, monkeypatch):
    run, sync = tmp_path / "tiny", tracking.Tracker.flush

    def flush(tracker, step):
        if step == 2:
            shutil.rmtree(run)
        return sync(tracker, step)

    monkeypatch.setattr(tracking.Tracker, "flush", flush)
    assert train_here(tmp_path, *SMALL) == 0
    assert checkpoints(tmp_path) == ["0000002", "0000003"]
    assert {"config.yaml", "metrics.jsonl"} <= set(os.listdir(run))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.slow
def test_a_disk_without_a_byte_left(tmp_path, monkeypatch, capsys):
    """At steps 2 and 3 nothing can be written: no checkpoint, no picture, no curves."""
    small, flush = tmp_path / "small", tracking.Tracker.flush
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", small]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("no right to mount")

    def change(tracker, step):
        filler = small / "filler"
        if step == 2:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        if step == 4:
            filler.unlink()
        return flush(tracker, step)

    monkeypatch.setattr(tracking.Tracker, "flush", change)
    try:
        words = (*SMALL, "run.trackers=[tensorboard]", "preview.every=1", "preview.num=2")
        code = train_here(small, *words, "preview.steps=2", "run.steps=5", "run.keep_last=9")
        error = capsys.readouterr().err
        assert code == 0 and "Traceback" not in error
        assert error.count("warning: the checkpoint of step") == 2
        assert error.count("pictures not written") == 1
        whole = {path.name for path in Checkpoints(small / "tiny").whole()}
        assert whole == {"0000001", "0000004", "0000005"} == set(checkpoints(small))
        assert not list(small.rglob("*.tmp")) and not list(small.rglob(".tmp*"))
    finally:
        subprocess.run(["umount", small], check=True)
