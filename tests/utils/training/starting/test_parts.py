"""Which rows, projectors and positions of a checkpoint still have a place in a new run.

python -m pytest tests/utils/training/starting/test_parts.py
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.sit import sincos_pos_embed
from utils.training.starting.learned import Learned
from utils.training.starting.parts import (
    compare_classes,
    compare_projectors,
    is_fixed,
    match_classes,
    resize_positions,
)

NAMES = st.lists(st.sampled_from("cat dog owl 0 1 2 3".split()), unique=True, min_size=1)  # noqa: SIM905
SIT = {"num_classes": 3, "class_dropout_prob": 0.1, "encoder_dims": [8, 8], "projector": "mlp"}
SIT |= {"projector_dim": 4, "align_depth": 2}


@given(NAMES, NAMES, st.booleans())
def test_a_class_is_taken_by_its_name_or_all_are_by_number(old, new, asked):
    taken, how = match_classes(old, new, asked)
    assert len(taken) == len(new)
    if how == "number":
        assert taken == list(range(len(old))) and not asked
        assert old != new and (not {*old} & {*new} or all(n.isdigit() for n in new))
    else:
        assert all(row is None or old[row] == name for row, name in zip(taken, new))
    if how == "name":
        assert all((row is None) == (name not in old) for row, name in zip(taken, new))
    if old == new:
        assert taken == list(range(len(old)))


@pytest.mark.parametrize(
    ("old", "new", "asked", "expected"),
    [
        (5, 5, False, [0, 1, 2, 3, 4]),  # an import, and no data yet
        (2, ["cat", "dog"], False, [0, 1]),
        (2, ["cat", "dog"], True, [None, None]),
        (3, ["cat", "dog"], False, [None, None]),
        (["cat", "dog", "owl"], ["owl", "cat"], False, [2, 0]),
        (["cat", "dog"], ["dog", "fox"], False, [1, None]),
        (["cat", "dog"], ["fox", "elk"], False, [0, 1]),
        (["cat", "dog"], ["fox", "elk"], True, [None, None]),
        (list("0123"), list("01"), False, [None, None]),  # numbers are no names
        (list("01"), list("01"), True, [0, 1]),
    ],
)
def test_classes_without_names_are_a_guess_that_init_new_decides(old, new, asked, expected):
    assert match_classes(old, new, asked)[0] == expected


def test_the_null_row_stays_the_last_one_and_a_guess_is_said():
    old = Learned(Path("a"), SIT | {"num_classes": 2}, ["cat", "dog"])
    part = compare_classes(old, SIT, ["owl", "dog", "fox"], asked=True)
    assert part.taken == [None, 1, None, 2]
    assert part.carried == "1 of 3 rows by name and the null row"
    assert part.new == "2 of 3 rows, random (owl, fox)" and part.left_out == "1 of 2 rows"
    part = compare_classes(old, SIT | {"class_dropout_prob": 0}, ["dog", "x", "y"], asked=True)
    assert part.taken == [1, None, None] and part.left_out.endswith("the null row")
    part = compare_classes(old, SIT | {"num_classes": 2}, ["elk", "fox"], asked=False)
    assert "run.init_new" in part.doubt and not part.new
    without = Learned(Path("a"), SIT | {"class_dropout_prob": 0}, ["cat", "dog", "owl"])
    part = compare_classes(without, SIT, ["cat", "dog", "owl"], asked=False)
    assert part.taken == [0, 1, 2, None] and part.new == "the null row"


@pytest.mark.parametrize(
    ("encoders", "had", "changes", "asked", "expected"),
    [
        (["a", "b"], ["a", "b"], {}, False, [0, 1]),
        (["b", "a"], ["a", "b"], {}, False, [1, 0]),
        (["b", "c"], ["a", "b"], {}, True, [1, None]),  # of the same shape, of another encoder
        (["a", "a"], ["a", "b"], {}, True, [0, None]),
        (["a", "b"], ["a", "b"], {"encoder_dims": [9, 8]}, True, [None, 1]),
        (["a", "b"], ["a", "b"], {"projector_dim": 5}, True, [None, None]),
        (["a", "b"], ["a", "b"], {"projector": "conv"}, True, [None, None]),
        (["a", "b"], None, {}, False, [0, 1]),
        (["a", "b"], None, {}, True, [None, None]),
        (["a", "b"], None, {"encoder_dims": [8]}, False, [0, None]),
        ([], ["a", "b"], {}, False, []),
    ],
)
def test_a_projector_stays_with_its_encoder_and_its_shape(encoders, had, changes, asked, expected):
    old = Learned(Path("a"), SIT | changes, encoders=had)
    part = compare_projectors(old, SIT, encoders, asked)
    assert part.taken == expected
    assert bool(part.new) == (None in expected)
    assert bool(part.carried) == any(k is not None for k in expected)
    dropped = {*range(len(old.sit["encoder_dims"]))} - {*expected}
    assert len(part.left_out.split("channels")) - 1 == len(dropped)
    assert bool(part.doubt) == (had is None and bool(part.carried))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fixed_table_is_known_in_any_storage_and_made_anew(dtype):
    table = sincos_pos_embed(32, 4)[None].to(dtype)
    assert is_fixed(table) and not is_fixed(table + 0.018)  # 30 steps of the official code
    assert torch.equal(resize_positions(table, 6), sincos_pos_embed(32, 6)[None])


@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 99))
def test_a_trained_table_is_resized_row_by_row(side, grid, seed):
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(1, side * side, 8, generator=g)
    resized = resize_positions(table, grid)
    assert resized.shape == (1, grid * grid, 8)
    if grid == side:
        torch.testing.assert_close(resized, table)
    # what does not change along a row does not change along one afterwards
    along = torch.randn(1, side, 1, 8, generator=g).expand(1, side, side, 8).flatten(1, 2)
    rows = resize_positions(along, grid).unflatten(1, (grid, grid))
    torch.testing.assert_close(rows, rows[:, :, :1].expand_as(rows))
