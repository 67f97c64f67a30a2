"""The resumable writer of sharded arrays, and their reader."""

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from models.checks.errors import UserError
from utils import files
from utils.data.sharded import ShardedFolder, ShardedRows

ROWS = {"pixels": ((2, 3), np.uint8), "latents": ((5,), np.float16)}
PLAN = {"seed": 1, "weights": {"a": "x", "b": "y"}, "shape": (2, 3)}


@dataclass
class Record:
    shard: int


def folder_at(path: Path, **changes) -> ShardedFolder:
    given = {"plan": PLAN, "num_items": 11, "shard_size": 4, "rows": ROWS} | changes
    return ShardedFolder(path, **given)


def write(folder: ShardedFolder, shards=None, kept=None) -> None:
    """Item i is filled with the number i."""
    for shard in folder.unfinished() if shards is None else shards:
        for rows in folder.draft(shard).values():
            rows[:] = np.array(folder.items(shard)).reshape(-1, *[1] * (rows.ndim - 1))
        folder.seal(shard, {"shard": shard}, kept)


def test_shards_hold_their_items(tmp_path):
    folder = folder_at(tmp_path / "new" / "f")
    assert folder.num_shards == 3 and folder.items(2) == range(8, 11)
    assert folder.bytes_to_write() == 11 * (2 * 3 + 5 * 2) and not folder.folder.exists()
    folder.begin()
    write(folder, [1])
    assert folder.unfinished() == [0, 2] and folder.bytes_to_write() == 7 * 16
    write(folder)
    for shard in range(3):
        for array, (shape, dtype) in ROWS.items():
            rows = folder.read(shard, array)
            assert rows.shape == (len(folder.items(shard)), *shape) and rows.dtype == dtype
            assert rows.reshape(len(rows), -1)[:, 0].tolist() == [*folder.items(shard)]
        assert folder.record(shard, Record) == Record(shard)
    assert folder.unfinished() == [] and folder.bytes_to_write() == 0
    names = {p.name for p in folder.folder.iterdir()}
    expected = {f"{a}-0000{k}.npy" for a in ROWS for k in range(3)}
    assert names == expected | {f"shard-0000{k}.json" for k in range(3)} | {"plan.json"}
    folder.remove()
    assert not folder.folder.exists()


@pytest.mark.parametrize("kept", [[0, 2], [3], []])
def test_dropped_rows_leave_no_gap(tmp_path, kept):
    folder = folder_at(tmp_path)
    folder.begin()
    write(folder, [1], kept)
    assert folder.read(1, "latents")[:, 0].tolist() == [4 + row for row in kept]
    assert folder.file("pixels", 1).stat().st_size == 128 + 6 * len(kept)
    assert 1 not in folder.unfinished()


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f.file("latents", 1).unlink(),
        lambda f: f.file("latents", 1).write_bytes(f.file("latents", 1).read_bytes()[:-1]),
        lambda f: f.file("latents", 1).write_bytes(b"cut in the header"),
        lambda f: np.save(f.file("latents", 1), np.zeros((4, 5), np.float32)),
        lambda f: np.save(f.file("latents", 1), np.zeros((4, 6), np.float16)),
        lambda f: np.save(f.file("latents", 1), np.zeros((3, 5), np.float16)),
        lambda f: f.record_file(1).unlink(),
        lambda f: f.record_file(1).write_text("{"),
        lambda f: f.draft(1),  # killed while it was written anew
    ],
)
def test_a_damaged_shard_is_unfinished(tmp_path, damage):
    folder = folder_at(tmp_path)
    folder.begin()
    write(folder)
    damage(folder)
    assert folder_at(tmp_path).unfinished() == [1]
    write(again := folder_at(tmp_path))
    assert again.read(1, "latents")[:, 0].tolist() == [4, 5, 6, 7]


def test_meta_is_there_only_while_all_shards_are(tmp_path):
    folder = folder_at(tmp_path)
    folder.begin()
    write(folder)
    folder.finish({"all": True})
    folder.begin()
    assert json.loads((tmp_path / "meta.json").read_text()) == {"all": True}
    folder.file("pixels", 0).unlink()
    folder.begin()
    assert not (tmp_path / "meta.json").exists()


def test_another_plan_is_refused_with_each_difference(tmp_path):
    folder_at(tmp_path).begin()
    folder_at(tmp_path).begin()  # the same one; a tuple is a list on disk
    other = {"seed": 2, "weights": {"a": "x", "b": "z"}, "shape": (2, 3), "new": None, "more": True}
    with pytest.raises(UserError) as error:
        folder_at(tmp_path, plan=other).begin()
    text = str(error.value)
    assert "begun with seed=1, now 2, weights={" in text and "more=null, now true" in text
    assert "shape" not in text and "new=" not in text


def test_folders_that_are_refused(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes\.txt\)"):
        folder_at(tmp_path).begin()
    with pytest.raises(UserError, match="is a file"):
        folder_at(tmp_path / "notes.txt").check_plan()
    with pytest.raises(UserError, match="cannot make the folder"):
        folder_at(tmp_path / "notes.txt" / "f").begin()
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.05)
    (tmp_path / "f").mkdir()
    with FileLock(tmp_path / "f" / ".lock"), pytest.raises(UserError, match="another run writes"):
        folder_at(tmp_path / "f").locked().__enter__()
    with folder_at(tmp_path / "f").locked():
        folder_at(tmp_path / "f").begin()  # .lock is no foreign file


def test_rows_are_read_across_shards_with_few_open_files(tmp_path):
    folder = folder_at(tmp_path, num_items=12, shard_size=2)
    folder.begin()
    write(folder)
    paths = [folder.file("latents", shard) for shard in range(6)]
    rows = ShardedRows(paths, [2] * 6, ROWS["latents"], "make it again", 2)
    rows = pickle.loads(pickle.dumps(rows))
    assert len(rows) == 12
    for i in (11, 0, 5, 1, 10):
        assert rows[i].tolist() == [i] * 5 and len(rows._maps) <= 2
    assert pickle.loads(pickle.dumps(rows))._maps == {}
    for i in (12, -1):
        with pytest.raises(IndexError):
            rows[i]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: (p.unlink(), p.mkdir()), "a folder"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "a FIFO"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_text("text"), "a text file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "cut short"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "expected"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"(4, 5)", b"(4, 5")), "no whole .npy"),
        (lambda p: np.save(p, np.zeros((3, 5), np.float16)), r"\(3, 5\)"),
        (lambda p: np.save(p, np.zeros((4, 5), np.float32)), "float32"),
        (lambda p: np.save(p, np.zeros((5, 4), np.float16).T), "Fortran"),
        (lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "object"),
    ],
)
def test_rows_that_are_not_what_was_written_are_refused(tmp_path, damage, word):
    folder = folder_at(tmp_path)
    folder.begin()
    write(folder)
    paths = [folder.file("latents", shard) for shard in range(3)]
    damage(paths[1])
    with pytest.raises(UserError, match=rf"latents-00001\.npy.*{word}.*; again"):
        ShardedRows(paths, [4, 4, 3], ROWS["latents"], "again")
    assert folder.unfinished() == [1]


@pytest.mark.parametrize("plan", ["[]", "1", "{", "null", '"x"', "[" * 9999])
def test_a_plan_that_is_none_is_refused(tmp_path, plan):
    folder_at(tmp_path).begin()
    (tmp_path / "plan.json").write_text(plan)
    with pytest.raises(UserError, match=r"plan\.json .*delete"):
        folder_at(tmp_path).begin()


@pytest.mark.parametrize("record", ["{}", "[]", '{"shard": "1"}', '{"shard": null}'])
def test_a_record_of_a_shard_that_does_not_fit_is_refused(tmp_path, record):
    folder = folder_at(tmp_path)
    folder.begin()
    write(folder)
    folder.record_file(1).write_text(record)
    with pytest.raises(UserError, match=r"shard-00001\.json.*delete"):
        folder.records(Record)


def test_what_cannot_be_written_is_one_line(tmp_path):
    folder = folder_at(tmp_path)
    folder.begin()
    (tmp_path / "pixels-00000.tmp").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*pixels-00000\.tmp"):
        folder.draft(0)
