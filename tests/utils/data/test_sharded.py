"""The resumable writer of sharded arrays, and their reader."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from models.errors import UserError
from utils import files
from utils.data.sharded import ShardedFolder, ShardedRows

ROWS = {"pixels": ((2, 3), np.uint8), "latents": ((5,), np.float16)}
PLAN = {"seed": 1, "weights": {"a": "x", "b": "y"}, "shape": (2, 3)}


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
        assert folder.record(shard) == {"shard": shard}
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
    rows = pickle.loads(pickle.dumps(ShardedRows(paths, [2] * 6, 10, "make it again", 2)))
    assert len(rows) == 12
    for i in (11, 0, 5, 1, 10):
        assert rows[i].tolist() == [i] * 5 and len(rows._maps) <= 2
    assert pickle.loads(pickle.dumps(rows))._maps == {}
    for i in (12, -1):
        with pytest.raises(IndexError):
            rows[i]
    with pytest.raises(UserError, match=r"latents-00003\.npy is missing or cut short.*; again"):
        ShardedRows(paths, [2, 2, 2, 200, 2, 2], 10, "again")
