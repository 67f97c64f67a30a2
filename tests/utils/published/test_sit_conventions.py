"""The original SiT's time and variance head, against a SiT written independently."""

import argparse

import pytest
import torch

from models.checks.errors import UserError
from tests.published_files import (
    CLASSES,
    HEADS,
    PATCH,
    SIDE,
    namespace,
    original_sit_state,
    sit_state,
    velocity,
)
from utils.published.files import PublishedFile
from utils.published.networks import sit_config, sit_from_state
from utils.published.sit_conventions import (
    interpolant_path,
    is_original_sit,
    predicts_variance,
    reverse_time,
    without_variance,
)


def test_reversed_time_and_the_velocity_half_are_exact():
    state = original_sit_state(6, out=8)
    assert predicts_variance(state, "x") and not predicts_variance(sit_state(1), "x")
    halved = without_variance(state)
    stats = (torch.zeros(4), torch.ones(4))
    sit = sit_from_state(halved, sit_config(halved, {}, HEADS, "x"), stats, "x")
    reverse_time(sit)
    x, y = torch.randn(2, 4, SIDE, SIDE), torch.tensor([1, CLASSES])
    for t in (0.0, 0.3, 1.0):
        with torch.no_grad():
            found = sit(x, torch.full((2,), t), y)[0]
        expected = -velocity(state, x, 1 - t, y)[:, :4]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert all(p.requires_grad for p in sit.final_layer.linear.parameters())


def test_a_last_layer_that_does_not_fit_is_left_for_the_strict_load():
    state = original_sit_state(6, out=8)
    state["final_layer.linear.bias"] = torch.zeros(3)
    halved = without_variance(state)
    assert halved["final_layer.linear.bias"].shape == (3,)
    assert len(halved["final_layer.linear.weight"]) == PATCH * PATCH * 4


def test_what_has_a_trace_of_repa_is_not_an_original_sit(tmp_path):
    path = tmp_path / "x.pt"
    assert is_original_sit(PublishedFile(path, model=original_sit_state(1)))
    assert is_original_sit(PublishedFile(path, ema=original_sit_state(1), args={"lr": 1e-4}))
    for state, args in (
        (sit_state(1, bn=False), {}),
        (sit_state(1, projectors=False), {}),
        (original_sit_state(1), vars(namespace())),
    ):
        assert not is_original_sit(PublishedFile(path, model=state, args=args))


def test_interpolants_by_the_names_of_repa_e_and_of_sit():
    for path, expected in (
        ("linear", "linear"), ("cosine", "cosine"), ("Linear", "linear"), ("GVP", "cosine"),
    ):  # fmt: skip
        assert interpolant_path({"path_type": path, "prediction": "velocity"}, "x") == expected
    assert interpolant_path({}, "x") == "linear"
    for args in ({"path_type": "VP"}, {"prediction": "noise"}):
        with pytest.raises(UserError, match="only linear, cosine"):
            interpolant_path(vars(argparse.Namespace(**args)), "x")
