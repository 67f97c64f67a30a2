"""One rule for what a folder of pictures holds: training and evaluation count the same images.

python -m pytest tests/utils/data/test_listing.py
"""

import os
import socket

import pytest
from PIL import Image

from models.checks.errors import UserError
from utils.data.listing import MOST_KINDS, holds_images, list_images
from utils.data.registry import open_source
from utils.evaluation.images.image_sets import open_images


def fill(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(("png", "webp", "jpeg")):
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.touch()
    return root


def counted(root) -> tuple[list[str], list[str]]:
    """The images of a folder, sorted, and what is said of the others: by training and evaluation,
    which agree."""
    source, images = open_source("folder", root, 8), open_images(root)
    keys = sorted(source.key(i) for i in range(len(source)))
    assert keys == sorted(images.names) and len(images) == len(source)
    notes = [note for note in source.notes if "ignored" in note]
    assert notes == list(images.notes) == list(open_images(f"folder:{root}@8").notes)
    return keys, notes


def test_hidden_names_are_skipped_counted_and_said(tmp_path):
    fill(tmp_path, "a/1.png", "a/.1.png", "a/.ipynb_checkpoints/1.png", "a/.DS_Store")
    fill(tmp_path, ".cache/x/1.png", "b/x.heic", "b/y.HEIC", "b/notes", "b/2.WebP", "b/3.JPEG")
    fill(tmp_path, "dataset.json.bak", "a/@eaDir/1.jpg/thumb.jpg")
    keys, (note,) = counted(tmp_path)
    assert keys == ["a/1.png", "b/2.WebP", "b/3.JPEG"]
    assert note.startswith("ignored: 3 hidden folders") and f"below {tmp_path} (first " in note
    kinds = ("2 hidden files", "3 hidden folders", "2 .heic", "1 .bak", "1 file without an ending")
    assert all(kind in note for kind in kinds)


def test_nothing_is_said_where_nothing_is_ignored(tmp_path):
    assert counted(fill(tmp_path, "a/1.png", "b/1.png"))[1] == []
    assert list_images(tmp_path).ignored_line() == ""


def test_what_is_no_file_is_ignored_and_never_waited_for(tmp_path, monkeypatch):
    fill(tmp_path / "d", "a/1.png", "x.png/1.png")  # a folder named x.png is a folder
    (tmp_path / "d/a/2.png").symlink_to("nowhere.png")
    (tmp_path / "d/a/3.png").symlink_to("3.png")
    os.mkfifo(tmp_path / "d/a/4.png")
    with socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(tmp_path / "d/a")  # the path of a socket is short
        unix.bind("5.png")
        keys, (note,) = counted(tmp_path / "d")
    assert keys == ["a/1.png", "x.png/1.png"]
    for part in ("2 broken links", "1 FIFO", "1 socket"):
        assert part in note


def test_links_are_followed_and_those_that_lead_back_end(tmp_path):
    """Also a class folder that is a link, and one to a folder above the data."""
    fill(tmp_path / "real", "b/1.png", "b/2.png")
    root = fill(tmp_path / "d", "a/1.png")
    (root / "b").symlink_to(tmp_path / "real/b")
    assert counted(root) == (["a/1.png", "b/1.png", "b/2.png"], [])
    for name, target in {"a/up": root, "a/self": root / "a", "c": tmp_path}.items():
        (root / name).symlink_to(target)
    keys, (note,) = counted(root)
    assert keys == ["a/1.png", "b/1.png", "b/2.png"]
    assert "3 links back to a folder above" in note
    (root / "a/b").symlink_to(tmp_path / "real/b")
    (tmp_path / "real/b/a").symlink_to(root / "a")
    assert counted(root)[0] == ["a/1.png", "a/b/1.png", "a/b/2.png", "b/1.png", "b/2.png",
                                "b/a/1.png"]  # fmt: skip


def test_many_ways_to_one_folder_are_one(tmp_path):
    """A ladder of double links has 2^30 paths."""
    root = fill(tmp_path / "d", "a/1.png")
    for k in range(30):
        (tmp_path / f"{k}").mkdir()
        for side in "lr":
            (tmp_path / f"{k}" / side).symlink_to(tmp_path / f"{k + 1}")
    fill(tmp_path, "30/x.png")
    (root / "a/l").symlink_to(tmp_path / "0")
    keys, (note,) = counted(root)
    assert len(keys) == 2 and "30 links to a folder that counts already" in note


def test_training_sorts_names_as_texts_and_evaluation_as_numbers(tmp_path):
    """The first order decides what a step reads, and must never change."""
    fill(tmp_path, *(f"c{c}/{i}.png" for c in (10, 2) for i in (10, 9, 1)))
    source, images = open_source("folder", tmp_path, 8), open_images(tmp_path)
    names = [f"c{c}/{i}.png" for c in (2, 10) for i in (1, 10, 9)]
    assert [source.key(i) for i in range(6)] == names
    assert images.names == [f"c{c}/{i}.png" for c in (2, 10) for i in (1, 9, 10)]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    fill(tmp_path, "a/1.png", "b/1.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for spec in (tmp_path, f"folder:{tmp_path}@8"):
        with pytest.raises(UserError, match=rf"cannot list {tmp_path}/b: Permission denied"):
            open_images(spec)


def test_pictures_of_kinds_that_are_not_read_are_named(tmp_path):
    fill(tmp_path, "a/1.heic", "a/2.heic", "b/1.png")
    with pytest.raises(UserError, match=r"convert its 2 other pictures to PNG \(first a/1\.heic"):
        open_source("folder", tmp_path, 8)
    (tmp_path / "b/1.png").unlink()
    for spec in (tmp_path, f"folder:{tmp_path}@8"):
        with pytest.raises(UserError, match=r"no images in .*convert its 2 other pictures"):
            open_images(spec)


def test_a_line_is_short_and_can_be_printed(tmp_path):
    fill(tmp_path, "1.png", *(f"{k}.k{k}" for k in range(20)), "x.{}", "a\nb.\nc")
    line = list_images(tmp_path).ignored_line()
    assert line.isprintable() and "others" in line and line.count(",") == MOST_KINDS
    line.encode()


def test_whether_a_folder_holds_images_is_seen_from_its_first_folders(tmp_path):
    fill(tmp_path, "a/b/1.png")
    assert holds_images(tmp_path, 3) and not holds_images(tmp_path, 2)
    assert not holds_images(tmp_path / "absent", 3)
