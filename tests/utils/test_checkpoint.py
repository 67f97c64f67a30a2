"""Checkpoints: their bytes, what is whole, which one a run begins from. What pruning keeps, for any
set of entries: test_checkpoint_properties.py.

python -m pytest tests/utils/test_checkpoint.py
"""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from models.checks.errors import UserError
from models.weights.headers import write_safetensors
from utils import sealed
from utils.checkpoint import Checkpoints, is_step
from utils.files import HashedFile, sha256_file
from utils.sealed import find_fault, read_state_json


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    monkeypatch.setattr(sealed, "versions", dict)


def fill(folder: Path) -> None:
    (folder / "sit").mkdir()
    (folder / "sit" / "weights").write_bytes(b"0123456789")


def save(run: Path, *steps: int, keep_last: int = 9, **kwargs) -> Checkpoints:
    checkpoints = Checkpoints(run, keep_last, **kwargs)
    for step in steps:
        checkpoints.save(step, fill, {})
    return checkpoints


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(os.listdir(checkpoints.folder))


# --------------------------------------------------------------------------------------
# Bytes.


def test_weights_are_the_bytes_of_safetensors_and_hashed_as_they_are_written(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).t(),
        "a": torch.tensor(7),
        "gr\u00fcn": torch.randn(4, 2, 1, 1).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5, requires_grad=True),
        "half": torch.ones(3, dtype=torch.bfloat16),
    }
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, tmp_path / "theirs", {"format": "pt"})
    with HashedFile(tmp_path / "ours") as file:
        write_safetensors(file.write, tensors, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert file.sha256 == sha256_file(tmp_path / "theirs")


def test_what_torch_saves_is_hashed_and_a_full_disk_stays_an_oserror(tmp_path, monkeypatch):
    with HashedFile(tmp_path / "a.pt") as file:
        torch.save({"a": torch.randn(1000)}, file)
    assert file.sha256 == sha256_file(tmp_path / "a.pt")
    assert torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)["a"].shape == (1000,)
    if Path("/dev/full").exists():
        with (
            pytest.raises(OSError, match="No space") as info,
            HashedFile(Path("/dev/full")) as file,
        ):
            torch.save({"a": torch.randn(100_000)}, file)
        assert info.value.errno == errno.ENOSPC


def test_hashes_that_the_writer_knows_are_not_computed_again(tmp_path, monkeypatch):
    def write(folder):
        with HashedFile(folder / "a") as file:
            file.write(b"a")
        return {"a": file.sha256}

    monkeypatch.setattr(sealed, "sha256_file", None)
    saved = Checkpoints(tmp_path).save(1, write, {})
    monkeypatch.undo()
    assert find_fault(saved) is None and read_state_json(saved).files == {
        "a": sha256_file(saved / "a")
    }


@pytest.mark.parametrize("when", ["in the middle", "at the end"])
def test_a_save_that_fails_leaves_all_as_it_was(tmp_path, when, monkeypatch):
    checkpoints = save(tmp_path, 1, 2, keep_last=1)

    def broken(folder):
        fill(folder)
        if when == "in the middle":
            raise OSError(errno.ENOSPC, "No space left on device")

    if when == "at the end":

        def fail(*args):
            raise OSError(errno.EIO, "I/O error")

        monkeypatch.setattr(sealed, "sync_tree", fail)
    with pytest.raises(OSError):
        checkpoints.save(3, broken, {})
    with pytest.raises(OSError, match="are needed"):  # known before anything is written
        checkpoints.save(3, broken, {}, num_bytes=2**60)
    assert names(checkpoints) == ["0000002"]


# --------------------------------------------------------------------------------------
# Which ones are kept.


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failed_save(tmp_path, monkeypatch, capsys):
    checkpoints = save(tmp_path, 1)

    def stuck(path, *args, **kwargs):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or stuck(path)
        )
        patch.setattr(checkpoints, "keep_last", 1)
        assert find_fault(checkpoints.save(2, fill, {})) is None
        (line,) = capsys.readouterr().err.splitlines()
        assert "0000002 is saved" in line and ".trash-0000001" in line
    checkpoints.sweep()
    assert names(checkpoints) == ["0000002"]


@pytest.mark.parametrize("prefix", sealed.UNFINISHED)
@pytest.mark.parametrize("kind", ["link", "link to nothing", "file"])
def test_a_name_of_unfinished_work_that_is_taken_is_freed(tmp_path, prefix, kind):
    checkpoints = save(tmp_path / "run", 1)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()

    def take(name: str) -> None:
        path = checkpoints.folder / f"{prefix}{name}"
        target = tmp_path / ("precious" if kind == "link" else "nothing")
        path.touch() if kind == "file" else path.symlink_to(target)

    take("0000001" if prefix == ".trash-" else "0000002")
    save(tmp_path / "run", 2, keep_last=1)
    assert names(checkpoints) == ["0000002"]
    take("0000002")
    checkpoints.sweep()
    assert names(checkpoints) == ["0000002"] and (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to("nothing")])
def test_what_has_the_name_of_the_next_checkpoint_is_named_and_left_alone(tmp_path, make):
    checkpoints = save(tmp_path, 1)
    make(checkpoints.path(2))
    with pytest.raises(FileExistsError, match="is taken by") as info:
        save(tmp_path, 2)
    assert info.value.filename == str(checkpoints.path(2)) and os.path.lexists(checkpoints.path(2))
    assert names(checkpoints) == ["0000001", "0000002"]


@pytest.mark.parametrize(
    ("make", "words"), [(os.mkdir, "a folder"), (os.mkfifo, "a FIFO"), (None, "missing")]
)
def test_what_stands_in_place_of_a_file_is_named(tmp_path, make, words):
    folder = save(tmp_path, 1).path(1)
    (folder / "sit" / "weights").unlink()
    if make:
        make(folder / "sit" / "weights")
    assert find_fault(folder) == f"sit/weights is {words}"


def test_steps_are_numbers(tmp_path):
    checkpoints = save(tmp_path, 9_999_998, 9_999_999, 10_000_000, keep_last=2)
    assert names(checkpoints) == ["10000000", "9999999"]
    assert checkpoints.latest() == checkpoints.path(10_000_000)
    assert [p.name for p in checkpoints.whole()] == ["9999999", "10000000"]


@given(st.integers(0, 10**12))
def test_a_step_has_one_name(step):
    name = Checkpoints(Path()).path(step).name
    assert is_step(name) and int(name) == step
    assert not is_step("0" + name) and not is_step(name + "x") and not is_step(f"+{name}")


# --------------------------------------------------------------------------------------
# What is whole.

WRONG = {
    "empty": b"", "list": b"[]", "number": b"7", "no utf-8": b"\xff\xfe", "null": b"null",
    "deep": b"[" * 100_000, "object": b"{}", "word": b"not found", "nan": b'{"step": NaN}',
}  # fmt: skip


@pytest.mark.parametrize("content", [*WRONG.values()], ids=WRONG)
def test_a_state_json_of_another_kind_is_damage(tmp_path, content):
    checkpoints = save(tmp_path, 2, 4)
    (checkpoints.path(4) / "state.json").write_bytes(content)
    assert "no valid state.json" in find_fault(checkpoints.path(4))
    assert checkpoints.latest(lambda line: None) == checkpoints.path(2)


@pytest.mark.parametrize("place", ["folder", "fifo", "link to itself", "link to nothing"])
def test_a_state_json_that_is_no_file_is_damage(tmp_path, place):
    state = save(tmp_path, 4).path(4) / "state.json"
    state.unlink()
    if place == "folder":
        state.mkdir()
    elif place == "fifo":
        os.mkfifo(state)
    else:
        state.symlink_to(state if place == "link to itself" else tmp_path / "absent")
    assert "no valid state.json" in find_fault(state.parent)


@pytest.mark.parametrize(
    "change",
    [{"step": 5}, {"step": "4"}, {"step": True}, {"step": -1}, {"step": 4.5}, {"step": None},
     {"files": []}, {"files": {}}, {"files": {"sit/weights": 3}}, {"seed": 7}, {"more": 1},
     {"sha256": None}, {"sha256": "0" * 64}, {"format": 1}, {"format": 3}, {"format": "2"}],
    ids=str,
)  # fmt: skip
def test_a_changed_field_is_never_believed(tmp_path, change):
    state = save(tmp_path, 4).path(4) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    assert "no valid state.json" in find_fault(state.parent)


def test_no_byte_of_state_json_can_be_changed_without_notice(tmp_path):
    state = save(tmp_path, 4).path(4) / "state.json"
    before = state.read_bytes()
    for place in range(len(before)):
        state.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
        assert find_fault(state.parent), place


def old_state(folder: Path, **changes) -> None:
    """As it was written before state.json had a hash of its own."""
    state = json.loads((folder / "state.json").read_text())
    state = {k: v for k, v in state.items() if k not in ("format", "sha256")} | changes
    (folder / "state.json").write_text(json.dumps(state))


def test_a_checkpoint_of_before_is_whole_if_its_state_lists_all_that_is_there(tmp_path):
    folder = save(tmp_path, 4).path(4)
    old_state(folder)
    assert find_fault(folder) is None and read_state_json(folder).step == 4
    old_state(folder, files={})
    assert "sit/weights" in find_fault(folder)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../0000002/sit/weights", "sit/../../x", "", "a\0b"]
)
def test_no_file_outside_of_the_folder_is_named(tmp_path, name):
    folder = save(tmp_path, 4).path(4)
    old_state(folder, files={name: "0" * 64})
    assert "not in its folder" in find_fault(folder)


def test_a_whole_checkpoint_is_read_once_and_again_if_it_changes(tmp_path, monkeypatch):
    folder = save(tmp_path, 4).path(4)
    monkeypatch.setattr(sealed, "sha256_file", None)
    assert find_fault(folder) is None
    monkeypatch.undo()
    (folder / "sit" / "weights").write_bytes(b"012345678x")
    assert find_fault(folder) == "sit/weights is damaged"


# --------------------------------------------------------------------------------------
# What a run begins from.


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    checkpoints = save(tmp_path, 2, 4)
    for step in (2, 4):
        (checkpoints.path(step) / "sit" / "weights").write_bytes(b"012345678x")
    with pytest.raises(UserError, match=r"none is whole .*sit/weights is damaged"):
        checkpoints.choose_start("auto", report=lambda line: None)
    with pytest.raises(UserError, match="=never"):
        checkpoints.choose_start("never")


def test_a_link_to_a_checkpoint_is_no_reason_to_begin_anew(tmp_path):
    other = save(tmp_path / "other", 4)
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "0000004").symlink_to(other.path(4))
    with pytest.raises(UserError, match="is a link"):
        Checkpoints(tmp_path / "run").choose_start("auto")


def test_a_folder_of_checkpoints_that_is_none(tmp_path):
    assert Checkpoints(tmp_path).choose_start("auto") is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert Checkpoints(tmp_path).choose_start("auto") is None
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="must be the folder"):
        Checkpoints(tmp_path).choose_start("auto")
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "a disk that is not mounted")
    with pytest.raises(UserError, match="must be the folder"):
        Checkpoints(tmp_path).choose_start("auto")


def test_what_run_resume_names_is_said(tmp_path):
    other, (file, fifo) = save(tmp_path / "other", 4), (tmp_path / "file", tmp_path / "fifo")
    file.write_text("x")
    os.mkfifo(fifo)
    for path, words in (
        (tmp_path / "absent", "absent"),
        (file, "text file"),
        (fifo, "FIFO"),
        (Path("a\0b"), "not a whole checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            Checkpoints(tmp_path / "run").choose_start(str(path))
    for named in (other.path(4), other.folder, other.folder.parent):  # a run: its newest one
        assert Checkpoints(tmp_path / "run").choose_start(str(named)) == other.path(4)
    other.path(4).rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no whole checkpoint yet"):
        Checkpoints(tmp_path / "run").choose_start(str(other.folder.parent))


def test_a_run_that_began_with_a_path_goes_on_from_its_own_and_no_other_does(tmp_path):
    """Also when that path is gone; and an earlier config that was kept counts as well."""
    origin = save(tmp_path / "other", 4).path(4)
    own = save(tmp_path / "run", 6)
    with pytest.raises(UserError, match="holds 0000006 too"):
        own.choose_start(str(origin))
    (tmp_path / "run" / "config.yaml").write_text("run: {resume: auto}\n")
    (tmp_path / "run" / "config.0000002.yaml").write_text(f"run: {{resume: {origin}}}\n")
    (tmp_path / "run" / "config.0000003.yaml").write_bytes(b"\xff: [")
    os.mkfifo(tmp_path / "run" / "config.0000005.yaml")
    assert own.choose_start(str(origin)) == own.path(6)
    shutil.rmtree(origin)
    assert own.choose_start(str(origin)) == own.path(6)


def test_sweeping_takes_what_a_kill_has_left_and_nothing_else(tmp_path):
    checkpoints = save(tmp_path, 4)
    (tmp_path / "samples").mkdir()
    ours = ["checkpoints/.tmp-0000006/x", "checkpoints/.trash-0000002/x", ".config.yaml.tmp",
            "samples/.0000004.png.tmp"]  # fmt: skip
    mine = ["checkpoints/.tmp-mine/x", "checkpoints/.git/x", "samples/0000004.png", "a.tmp"]
    for name in ours + mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints" / ".tmp-0000008").symlink_to(tmp_path / "samples")
    checkpoints.sweep()
    assert not [name for name in ours if (tmp_path / name).exists()]
    assert (
        all((tmp_path / name).exists() for name in mine) and find_fault(checkpoints.path(4)) is None
    )
