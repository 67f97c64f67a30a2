"""Typed records: what fits is converted, what does not is named with its place and its value."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from models.checks.errors import UserError, shown
from models.checks.file_kinds import what_is
from models.checks.values import Range, RecordError, convert
from utils.records import load_record, number, parse_record


@dataclass
class Inner:
    name: str
    share: float = number(0.5, at_least=0, at_most=1)


@dataclass
class Outer:
    count: int = number(at_least=1)
    limit: int | None = number(None, at_least=0)
    kind: Literal["a", "b", 3] = "a"
    flag: bool = False
    inner: Inner | None = None
    many: list[Inner] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=dict)
    shape: tuple[int, int, int] = (1, 1, 1)
    betas: tuple[float, ...] = number((0.9,), at_least=0, below=1)
    text_or_number: str | int = 0
    anything: Any = None
    plain: dict = field(default_factory=dict)


def test_a_record_that_fits_is_converted():
    found = parse_record(
        {
            "count": 3,
            "limit": None,
            "kind": 3,
            "inner": {"name": "x", "share": 1, "unknown": [1]},
            "many": [{"name": "y"}],
            "table": {"k": 2},
            "shape": [4, 8, 8],
            "betas": [0, 0.5],
            "text_or_number": 7,
            "anything": [None],
            "plain": {"a": [1]},
            "a field of a later version": 1,
        },
        Outer,
    )
    assert found.inner == Inner("x", 1.0) and type(found.inner.share) is float
    assert found.many == [Inner("y", 0.5)] and found.table == {"k": 2.0}
    assert found.shape == (4, 8, 8) and found.betas == (0.0, 0.5) and found.limit is None
    assert found.kind == 3 and found.text_or_number == 7 and found.plain == {"a": [1]}


HUGE = 10**5000
WRONG = {
    "count": [None, 0, -1, True, 1.0, "1", [1], {}, HUGE, 2**63, float("nan")],
    "limit": [-1, False, 0.5, "null"],
    "kind": ["c", 3.0, True, None, ["a"]],
    "flag": [0, 1, "true", None],
    "inner": [[], "x", 1, {}, {"name": 1}, {"name": "x", "share": 2}, {"name": None}],
    "many": [{}, "ab", [1], [{}], None, [[{"name": "x"}]]],
    "table": [[], {"k": "1"}, {"k": None}, {"k": float("inf")}, {"k": HUGE}, {1: 2.0}],
    "shape": [[1, 2], [1, 2, 3, 4], [1, 2, 3.5], 3, "123", None],
    "betas": [[1], [-0.1], 0.9, [float("nan")], [[0.5]]],
    "text_or_number": [1.5, None, [], True],
    "plain": [[], 1, "x"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_does_not_fit_is_named(name):
    for value in WRONG[name]:
        with pytest.raises(RecordError) as caught:
            parse_record({"count": 1} | {name: value}, Outer)
        text = str(caught.value)
        assert name in text and "\n" not in text and len(text) < 200


@pytest.mark.parametrize("value", [None, [], "x", 3, [{"count": 1}]])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(RecordError, match="expected an object"):
        parse_record(value, Outer, "settings")
    with pytest.raises(RecordError, match="count is missing"):
        parse_record({}, Outer)


def test_places_in_lists_and_nested_records_are_named():
    for value, place in (
        ({"many": [{"name": "a"}, {"name": 2}]}, r"many\[1\]\.name=2"),
        ({"table": {"k": "x"}}, r"table\.k='x'"),
        ({"betas": [0.5, 1]}, r"betas\[1\]=1"),
    ):
        with pytest.raises(RecordError, match=place):
            parse_record({"count": 1} | value, Outer)


def test_a_range_knows_its_ends_and_takes_finite_numbers_alone():
    assert 0 in Range(at_least=0) and 0 not in Range(above=0)
    assert 1 in Range(at_most=1) and 1 not in Range(below=1)
    for value in (float("nan"), float("inf"), -float("inf"), HUGE, -HUGE, "1", None, [1]):
        assert value not in Range()
    assert str(Range(at_least=0, below=1)) == "at least 0 and below 1" and str(Range()) == ""


@pytest.mark.parametrize("kind", [bytes, set, set[int], complex, object])
def test_an_annotation_that_no_record_may_have_is_a_fault_of_ours(kind):
    with pytest.raises(TypeError, match="annotation"):
        convert(1, kind, "x")


def test_a_value_is_shown_short_whatever_it_is():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 1000, HUGE, [0] * 1000, deep):
        assert len(shown(value)) < 100


BAD_JSON = {
    "absent": None,
    "empty": b"",
    "text": b"hello",
    "cut": b'{"count": 1',
    "binary": b"\x80\x02\xff\x00",
    "latin": '{"count": "\u00e9"}'.encode("latin-1"),
    "deep": b"[" * 100_000,
    "long number": b'{"count": 1' + b"0" * 5000 + b"}",
    "list": b"[1]",
    "number": b"1",
    "NaN": b'{"count": NaN}',
    "null": b"null",
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_file_that_is_no_record_is_one_line_with_the_remedy(tmp_path, name):
    path = tmp_path / "r.json"
    if BAD_JSON[name] is not None:
        path.write_bytes(BAD_JSON[name])
    with pytest.raises(UserError) as caught:
        load_record(path, Outer, "make it again")
    text = str(caught.value)
    assert str(path) in text and text.endswith("make it again") and "\n" not in text
    assert len(text) < 400 + len(str(path))


def test_a_record_is_never_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name, words in (
        ("fifo", "a FIFO"),
        (".", "a folder"),
        ("loop", "symbolic links"),
        ("nowhere", "a link to nothing"),
        ("x" * 300, "too long"),
        ("nul\0", "null"),
    ):
        with pytest.raises(UserError, match=words):
            load_record(tmp_path / name, Outer, "make it again")
    with pytest.raises(UserError, match="device"):
        load_record(type(tmp_path)("/dev/zero"), Outer, "make it again")


def test_what_a_file_is_in_words(tmp_path):
    import numpy as np
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "f"
    for words, write in {
        "a PyTorch file": lambda: torch.save({"a": torch.zeros(1)}, path),
        "a PyTorch file of the format before 1.6": lambda: torch.save(
            {"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False
        ),
        "a safetensors file": lambda: save_file({"a": torch.zeros(1)}, path),
        "a text file": lambda: path.write_text("gr\u00fcn " * 500),
        "a JSON file": lambda: path.write_text(json.dumps({"a": 1})),
        "an HTML page": lambda: path.write_text("<!DOCTYPE html><html>404"),
        "an empty file": lambda: path.write_bytes(b""),
        "a NumPy array (.npy)": lambda: np.save(path.open("wb"), np.zeros(3)),
        "a NumPy archive (.npz)": lambda: np.savez(path.open("wb"), a=np.zeros(3)),
        "a binary file of no known kind": lambda: path.write_bytes(bytes(range(256))),
    }.items():
        write()
        assert what_is(path) == words
    assert what_is(tmp_path) == "a folder" and what_is(tmp_path / "none") == "absent"
    assert what_is(path / "below") == "absent"
