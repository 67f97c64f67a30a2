"""The original SiT's time and variance head, against a SiT written independently; what proves which
way a file counts time."""

import argparse
from pathlib import Path

import pytest
import torch

from models.checks.errors import UserError
from tests.published_files import (
    CLASSES,
    HEADS,
    PATCH,
    SIDE,
    first_release,
    namespace,
    original_sit_state,
    sit_state,
    velocity,
)
from utils.published.files import PublishedFile
from utils.published.networks import sit_config, sit_from_state
from utils.published.sit_conventions import (
    aligned_block,
    data_is_at_one,
    interpolant_path,
    is_dit,
    predicts_variance,
    reverse_time,
    with_todays_names,
    without_variance,
)
from utils.samplers import sample

STATS = (torch.zeros(4), torch.ones(4))


def test_reversed_time_and_the_velocity_half_are_exact():
    state = original_sit_state(6, out=8)
    assert predicts_variance(state, "x") and not predicts_variance(sit_state(1), "x")
    halved = without_variance(state)
    sit = sit_from_state(halved, sit_config(halved, {}, HEADS, "x"), STATS, "x")
    reverse_time(sit)
    x, y = torch.randn(2, 4, SIDE, SIDE), torch.tensor([1, CLASSES])
    for t in (0.0, 0.3, 1.0):
        with torch.no_grad():
            found = sit(x, torch.full((2,), t), y)[0]
        expected = -velocity(state, x, 1 - t, y)[:, :4]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert all(p.requires_grad for p in sit.final_layer.linear.parameters())


@torch.no_grad()
@pytest.mark.parametrize("at_one", [False, True])
def test_imports_sample_as_the_reference_does(at_one):
    """Euler of the probability flow with guidance in an interval, from noise to data, on the clock
    of the file; float64, as float32 would round away the last digits."""
    state = {k: v.double() for k, v in sit_state(5, out=8 if at_one else 4, bn=False).items()}
    kept = without_variance(state) if at_one else state
    sit = sit_from_state(kept, sit_config(kept, {}, HEADS, "x"), STATS, "x")
    if at_one:
        reverse_time(sit)  # rounds to float32
    sit = sit.double()
    noise, y = torch.randn(2, 4, SIDE, SIDE, dtype=torch.float64), torch.tensor([0, 3])
    steps, scale, low, high = 7, 2.0, 0.2, 0.7
    found = sample(sit, noise, y, solver="ode-euler", steps=steps, cfg_scale=scale,
                   guidance=(low, high))  # fmt: skip
    x, null = noise, torch.full_like(y, CLASSES)
    for i in range(steps):
        t = i / steps if at_one else 1 - i / steps  # of the file
        v = velocity(state, x, t, y)[:, :4]
        if low <= 1 - i / steps <= high:
            u = velocity(state, x, t, null)[:, :4]
            v = u + scale * (v - u)
        x = x + v / steps if at_one else x - v / steps
    assert (found - noise).abs().max() > 0.1
    torch.testing.assert_close(found.double(), x, atol=1e-6, rtol=1e-6)


def test_a_last_layer_that_does_not_fit_is_left_for_the_strict_load():
    state = original_sit_state(6, out=8)
    state["final_layer.linear.bias"] = torch.zeros(3)
    halved = without_variance(state)
    assert halved["final_layer.linear.bias"].shape == (3,)
    assert len(halved["final_layer.linear.weight"]) == PATCH * PATCH * 4


def published(state: dict, args=None, name="ema.pt") -> PublishedFile:
    return PublishedFile(Path(name), Path(name), ema=state, args=args or {})


BARE, VARIANCE = original_sit_state(1), original_sit_state(1, out=8)


@pytest.mark.parametrize(
    ("file", "at_one", "why"),
    [
        (published(sit_state(1, bn=False)), False, "projectors"),
        (published(sit_state(1, projectors=False)), False, "bn"),
        (published(first_release(original_sit_state(1))), False, "decoder_blocks"),
        (published(BARE, vars(namespace())), False, "enc_type=dinov2-vit-b"),
        (published(BARE, {"prediction": "v"}), False, "prediction=v"),
        (published(BARE, {"path_type": "Linear"}), True, "path_type=Linear"),
        (published(BARE, {"prediction": "velocity", "train_eps": None}), True, "velocity"),
        (published(VARIANCE, name="SiT-XL-2-256x256.pt"), True, "name SiT with a variance head"),
        (published(VARIANCE, {"model": "SiT-S/2"}, "DiT.pt"), True, "variance head"),
        (published(VARIANCE, {"_class_name": "SiTTransformer2DModel"}), True, "variance head"),
        (published(BARE, {"model_type": "LightningDiT-B/1"}), True, "LightningDiT"),
    ],
)  # fmt: skip
def test_what_proves_which_way_time_is_counted(file, at_one, why):
    found, because = data_is_at_one(file)
    assert found is at_one and why in because and not is_dit(file)
    assert data_is_at_one(file, "repa") == (False, "--time repa")
    assert data_is_at_one(file, "sit") == (True, "--time sit")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (published(BARE), "nothing in the file shows it: give --time"),
        (published(BARE, {"lr": 1e-4}, "SiT-XL-2.pt"), "nothing in the file shows it: give --time"),
        (published(BARE, {"model": "SiT-XL/2"}), "nothing in the file shows it: give --time"),
        (published(VARIANCE), "may even be a DiT"),
        (published(VARIANCE, name="deposit.pt"), "may even be a DiT"),
        (published(BARE, {"path_type": "linear"}), "nothing in the file shows it: give --time"),
        # REPA calls its networks SiT, too
        (published(VARIANCE, {"path_type": "linear", "model": "SiT-B/2"}), "may even be a DiT"),
        (published(sit_state(1), {"path_type": "GVP"}),
         r"projectors.\*, bn.\* speak for t = 0, but path_type=GVP for t = 1"),
    ],
)  # fmt: skip
def test_without_a_proof_or_with_both_the_user_has_to_say(file, words):
    with pytest.raises(UserError, match=words) as caught:
        data_is_at_one(file)
    assert "--time repa or --time sit" in str(caught.value) and "\n" not in str(caught.value)
    assert not is_dit(file)


def test_a_dit_is_known_by_its_name_alone():
    for file in (
        published(VARIANCE, name="DiT-XL-2-256x256.pt"),
        published(VARIANCE, {"model": "DiT-B/4"}),
        published(VARIANCE, {"model": "DiT-B/4"}, "SiT.pt"),
    ):
        assert is_dit(file)
    for name in ("MaskDiT.pt", "LightningDiT.pt", "edit.pt", "sit-vs-dit.pt"):
        assert not is_dit(published(VARIANCE, name=name))
    with pytest.raises(UserError, match=r"by its name it is a DiT: .* give --time"):
        data_is_at_one(published(BARE, name="DiT-S-2.pt"))


def test_the_first_release_of_repa_becomes_one_row_of_blocks():
    state = sit_state(1)
    old = first_release(state)
    assert "decoder_blocks.0.attn.qkv.weight" in old and "blocks.2.attn.qkv.weight" not in old
    found = with_todays_names(old)
    assert aligned_block(old) == 2 and found.keys() == state.keys()
    assert all(found[name] is state[name] for name in state)
    assert with_todays_names(state) == state and aligned_block(state) is None


def test_projectors_of_irepa_and_of_kinds_that_are_not_known():
    bare = original_sit_state(1)
    names = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
    for shape, parts, kept in (
        ((16, 48, 3, 3), ("weight", "bias"), True),
        ((16, 48), names, True),
        ((16, 48), ("weight", "bias"), False),  # one linear layer
        ((16, 48, 5, 5), ("weight", "bias"), False),
    ):
        projectors = {f"projectors.0.projection_layer.{part}": torch.ones(shape) for part in parts}
        known = {f"projectors.0.{part}" for part in parts} if kept else set()
        assert with_todays_names(bare | projectors).keys() == bare.keys() | known


def test_interpolants_by_the_names_of_repa_e_and_of_sit():
    for path, expected in (
        ("linear", "linear"), ("cosine", "cosine"), ("Linear", "linear"), ("GVP", "cosine"),
    ):  # fmt: skip
        assert interpolant_path({"path_type": path, "prediction": "velocity"}, "x") == expected
    assert interpolant_path({}, "x") == "linear"
    for args in ({"path_type": "VP"}, {"prediction": "noise"}):
        with pytest.raises(UserError, match="only linear, cosine"):
            interpolant_path(vars(argparse.Namespace(**args)), "x")
