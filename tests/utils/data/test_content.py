"""A file's hash is what the file holds now, whether it is read or was read before."""

import hashlib
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from models.checks.errors import UserError
from utils.data import content
from utils.data.content import STORE, digests, file_sha256, file_sha256s
from utils.evaluation.images.image_sets import open_images


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch) -> Path:
    """An empty store, and files that count as settled as soon as they are written."""
    monkeypatch.setenv("REPA_E_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "SETTLED", 0)
    monkeypatch.setattr(content, "_untold_devices", frozenset)
    content._say_once.cache_clear()
    return tmp_path / "cache" / STORE


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old content")
    return path


class Reader:
    """Reads files for `digests`, and counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, path, tell):
        self.count += 1
        return hashlib.sha256(Path(path).read_bytes()).digest()

    def found(self, *paths: Path) -> int:
        """How many of the files were read for their hashes, which are right."""
        before = self.count
        expected = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
        assert digests(paths, "counted", self) == expected
        return self.count - before


def tick() -> None:
    """Until a write is later than all before it: file systems count by the clock's ticks."""
    time.sleep(0.01)


def keeping_times(path: Path, replace) -> None:
    tick()
    before = path.stat()
    replace()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_the_hash_is_that_of_the_bytes(file):
    large = file.with_name("large")
    large.write_bytes(os.urandom(3 * content.BLOCK + 1))
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (large, file, large)]
    for _ in range(2):
        assert file_sha256s([large, str(file), large]) == expected
    assert file_sha256(file) == expected[1] and file_sha256s([]) == []


def test_a_file_is_read_once_until_it_is_another_one(file, tmp_path):
    read = Reader()
    assert [read.found(file) for _ in range(3)] == [1, 0, 0]
    assert read.found(file, file.with_name("file")) == 0
    keeping_times(file, lambda: file.write_bytes(b"new content"))
    assert [read.found(file), read.found(file)] == [1, 0]
    other = file.with_name("other")
    other.write_bytes(b"one by name")
    keeping_times(file, lambda: other.replace(file))
    assert [read.found(file), read.found(file)] == [1, 0]


def test_links_count_as_what_they_lead_to(file, tmp_path):
    read, link, folder = Reader(), tmp_path / "link", tmp_path / "linked"
    (tmp_path / "another").mkdir()
    (tmp_path / "another/file").write_bytes(b"new content")
    link.symlink_to(file)
    folder.symlink_to(file.parent)
    assert [read.found(link), read.found(file), read.found(folder / "file")] == [1, 1, 0]
    tick()
    for path, target in ((link, tmp_path / "another/file"), (folder, tmp_path / "another")):
        path.unlink()
        path.symlink_to(target)
    assert [read.found(link), read.found(folder / "file"), read.found(link)] == [1, 1, 0]


def test_what_changed_just_now_or_while_it_is_read_is_read_again(file, monkeypatch):
    def change(path, tell):
        found = hashlib.sha256(file.read_bytes()).digest()
        tick()
        file.write_bytes(b"new content")
        return found

    digests([file], "counted", change)
    read = Reader()
    assert [read.found(file), read.found(file)] == [1, 0]
    monkeypatch.setattr(content, "SETTLED", 60)
    assert [read.found(file), read.found(file)] == [1, 1]


def test_where_times_tell_nothing_every_file_is_read(file, monkeypatch):
    """On a tmpfs, a program that holds a map can write to it and leave all times as they are."""
    device = file.stat().st_dev
    monkeypatch.setattr(content, "_untold_devices", lambda: frozenset({device}))
    read = Reader()
    assert [read.found(file), read.found(file)] == [1, 1]


@pytest.mark.parametrize("damage", ["text", "a folder", "another table", "no place", "cut"])
def test_a_broken_store_is_no_store(file, store, damage, capsys):
    assert file_sha256(file) == hashlib.sha256(b"old content").hexdigest()
    if damage == "text":
        store.write_text("no data base" * 99)
    elif damage == "cut":
        store.write_bytes(store.read_bytes()[:-3000])
    else:
        store.unlink()
    if damage == "a folder":
        store.mkdir()
    elif damage == "another table":
        with sqlite3.connect(store) as db:
            db.execute("CREATE TABLE digests (a, b)")
        db.close()
    elif damage == "no place":
        store.parent.rmdir()
        store.parent.write_text("a file")
    for text in (b"old content", b"new content"):
        file.write_bytes(text)
        assert file_sha256(file) == hashlib.sha256(text).hexdigest()
    said = capsys.readouterr().err
    if damage != "cut":  # of which sqlite still reads what is whole
        assert said.count("\n") == 1 and "are not kept in" in said and STORE in said


def test_several_may_use_the_store_at_once(tmp_path):
    files = [tmp_path / str(i) for i in range(200)]
    for path in files:
        path.write_bytes(path.name.encode())
    expected = [hashlib.sha256(path.name.encode()).hexdigest() for path in files]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(file_sha256s, [files] * 4)) == [expected] * 4
    read = Reader()
    assert [read.found(*files), read.found(*files)] == [200, 0]


def test_what_cannot_be_read_is_one_line_or_stands_for_itself(file, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "absent", tmp_path / "fifo", tmp_path):
        with pytest.raises(UserError, match=r"cannot read .*; repair or remove it") as error:
            file_sha256s([file, path])
        assert "\n" not in str(error.value)
        assert file_sha256s([file, path], unreadable="none") == [file_sha256(file), "none"]


@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_an_array_file_is_hashed_once_until_it_is_replaced(tmp_path, ending, monkeypatch):
    path = tmp_path / f"a.{ending}"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), "u1")

    def save(images):
        (np.savez if ending == "npz" else np.save)(path, images)

    save(pixels)
    first = open_images(path).fingerprint()
    assert first == open_images(pixels).fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr("utils.evaluation.images.npz_images.image_hashes", None)
        assert open_images(path).fingerprint() == first
    keeping_times(path, lambda: save(255 - pixels))
    assert open_images(path).fingerprint() == open_images(255 - pixels).fingerprint() != first
