"""Files: written whole or not at all, locked, listed, sizes in words."""

import pytest

from models.checks.errors import UserError
from utils import files
from utils.files import (
    DRAFT,
    format_bytes,
    locked,
    read_json,
    read_lines,
    read_record,
    write_atomically,
    write_json,
    write_lines,
)


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def broken(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert path.read_text() == "old"
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new"


def test_a_link_in_the_place_of_a_draft_is_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / f".a.txt{DRAFT}").symlink_to("theirs")
    write_atomically(tmp_path / "a.txt", "ours")
    assert (tmp_path / "theirs").read_text() == "theirs"
    assert (tmp_path / "a.txt").read_text() == "ours" and not (tmp_path / "a.txt").is_symlink()


def test_json_comes_back_and_what_is_none_is_said(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None]})
    assert read_json(path, "make it") == read_record(path) == {"a": [1, None]}
    path.write_text("{")
    assert read_record(path) is None and read_record(tmp_path / "absent") is None
    assert read_record(path / "below-a-file.json") is None and read_record(tmp_path) is None
    for name in (path, tmp_path / "absent"):
        with pytest.raises(UserError, match="make it again"):
            read_json(name, "make it again")


def test_lines_may_hold_names_that_are_no_utf8(tmp_path):
    names = ["plain", "\udcff\udcfe", "gr\u00fcn"]
    write_lines(tmp_path / "keys.txt", names)
    assert read_lines(tmp_path / "keys.txt") == names


def test_one_command_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0)
    with locked(tmp_path), pytest.raises(UserError, match="another run writes"), locked(tmp_path):
        pass
    with locked(tmp_path):  # and it is free again
        pass


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.00 MiB"), (2**18, "0.25 MiB"), (3 * 2**20, "3.0 MiB"), (240.4 * 2**20, "240 MiB"),
     (3.14 * 2**30, "3.1 GiB"), (1234 * 2**30, "1,234 GiB")],
)  # fmt: skip
def test_sizes_in_words(size, text):
    assert format_bytes(size) == text
