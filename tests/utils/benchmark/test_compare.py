"""Two results beside each other, and files that are none.

python -m pytest tests/utils/benchmark/test_compare.py
"""

import json

import pytest

from models.checks.errors import UserError
from utils.benchmark.compare import FORMAT, compare

RESULT = {
    "format": FORMAT,
    "mode": "training",
    "device": "card",
    "ranks": 1,
    "images_per_second": 50.0,
    "step_ms": {"median": 640.0, "low": 1, "high": 2},
    "phases": {"sit": {"ms": 64.0, "ms_per_image": 2.0, "share": 0.1}},
    "settings": {"run.compile": False, "run.batch_size": 32},
}


def written(path, **changes):
    path.write_text(json.dumps(RESULT | changes))
    return path


@pytest.fixture
def first(tmp_path):
    return written(tmp_path / "a.json")


def test_figures_stand_beside_each_other_with_their_ratio(first, tmp_path):
    faster = {"run.compile": True, "run.batch_size": 32}
    phases = {"sit": {"ms_per_image": 1.0}, "encoder": {"ms_per_image": 0.25}}
    second = written(tmp_path / "b.json", images_per_second=75.0, settings=faster, phases=phases)
    lines = compare(first, second).splitlines()
    table = {line[:36].strip(): line[36:].split() for line in lines}
    assert table["images/s a rank"] == ["50", "75", "1.500x"]
    assert table["sit, ms an image"] == ["2", "1", "0.500x"]
    assert table["encoder, ms an image"] == ["-", "0.25"]
    assert any("run.compile: False -> True" in line for line in lines)
    assert not any("batch_size" in line for line in lines)


def test_a_prediction_stands_beside_a_measurement(first, tmp_path):
    other = written(tmp_path / "b.json", mode="prediction", kernels_per_step=4000)
    assert "kernels a step" in compare(first, other)


def test_results_of_different_kinds_are_refused(first, tmp_path):
    with pytest.raises(UserError, match=r"a.json is of training, .*b.json of sampling"):
        compare(first, written(tmp_path / "b.json", mode="sampling"))


BAD = {
    "": "an empty file",
    "{": "no valid JSON",
    "[1]": r"expected an object",
    '{"images_per_second": 3}': "format is missing",
    json.dumps(RESULT | {"format": "other"}): "format='other'",
    json.dumps(RESULT | {"mode": "cooking"}): "mode='cooking'",
    json.dumps(RESULT | {"images_per_second": "fast"}): "images_per_second='fast'",
    json.dumps(RESULT | {"images_per_second": -1}): "images_per_second=-1",
    json.dumps(RESULT | {"images_per_second": float("nan")}): "images_per_second=nan",
    json.dumps(RESULT | {"phases": {"sit": 3}}): "phases.sit=3",
    json.dumps(RESULT | {"phases": []}): "phases",
}


@pytest.mark.parametrize("text", BAD)
def test_a_file_that_is_no_result_is_one_line_with_the_remedy(first, tmp_path, text):
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    for pair in ((bad, first), (first, bad)):
        with pytest.raises(UserError, match=BAD[text]) as error:
            compare(*pair)
        assert "bad.json" in str(error.value) and "--json" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_missing_file_is_named(first, tmp_path):
    with pytest.raises(UserError, match=r"absent\.json not found"):
        compare(first, tmp_path / "absent.json")


@pytest.mark.parametrize("value", ["much", None, True, [1], float("nan"), 10**400, {"median": 3}])
def test_a_figure_that_is_no_number_is_left_out(first, tmp_path, value):
    other = written(tmp_path / "b.json", peak_memory_gib=value)
    assert "peak memory" not in compare(first, other)
