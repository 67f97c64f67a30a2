"""Networks from the names and shapes of published tensors."""

import pytest
import torch

from models.checks.errors import UserError
from models.discriminator import PatchGAN
from tests.published_files import (
    HEADS,
    SIDE,
    disc_state,
    namespace,
    original_sit_state,
    sit_state,
    velocity,
)
from utils.published.networks import (
    discriminator_from_state,
    sit_config,
    sit_from_state,
)

STATS = (torch.zeros(4), torch.ones(4))


def test_qk_norm_gives_the_heads_and_half_precision_is_widened():
    state = {k: v.half() if v.is_floating_point() else v
             for k, v in sit_state(4, qk_norm=True).items()}  # fmt: skip
    config = sit_config(state, {}, None, "x")
    assert config["qk_norm"] and config["num_heads"] == HEADS
    sit = sit_from_state(state, config, None, "x")
    assert sit.dtype == torch.float32 and not sit.training
    x, y = torch.randn(2, 4, SIDE, SIDE), torch.tensor([0, 3])
    with torch.no_grad():
        found = sit(x, torch.full((2,), 0.3), y)[0]
    expected = velocity({k: v.float() for k, v in state.items()}, x, 0.3, y)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_network_owns_its_weights():
    """Not the memory of the file, nor that of another network from the same state."""
    state = sit_state(1)
    config = sit_config(state, {}, HEADS, "x")
    first, second = (sit_from_state(state, config, None, "x") for _ in range(2))
    first.pos_embed.zero_()
    assert torch.equal(second.pos_embed, state["pos_embed"]) and state["pos_embed"].any()


def test_statistics_become_the_latent_norm_of_a_sit_without_one():
    state = original_sit_state(5)
    config = sit_config(state, {}, HEADS, "x")
    sit = sit_from_state(state, config, (torch.arange(4.0), torch.full((4,), 3.0)), "x")
    assert sit.bn.running_mean.tolist() == [0, 1, 2, 3] and sit.bn.running_var.tolist() == [9] * 4
    assert config["encoder_dims"] == [] and not len(sit.projectors)
    with pytest.raises(UserError, match=r"3 missing \(bn"):
        sit_from_state(state, config, None, "x")


def test_convolutional_projectors_of_irepa():
    state = sit_state(1, projectors=False)
    state |= {"projectors.0.weight": torch.ones(16, 48, 3, 3), "projectors.0.bias": torch.ones(16)}
    config = sit_config(state, vars(namespace()), None, "x")
    assert config["projector"] == "conv" and config["encoder_dims"] == [16]
    sit_from_state(state, config, None, "x")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_classes": float("inf"), "encoder_depth": float("inf")}, (5, 3)),
        ({"num_classes": "5", "encoder_depth": None, "cfg_prob": "x"}, (5, 3)),
        ({"num_classes": 6, "encoder_depth": 2}, (6, 2)),  # no row for the null label
    ],
)
def test_settings_that_are_no_positive_numbers_are_ignored(settings, expected):
    config = sit_config(sit_state(1), settings, HEADS, "x")
    assert (config["num_classes"], config["align_depth"]) == expected
    assert config["class_dropout_prob"] == (0.1 if config["num_classes"] == 5 else 0.0)


@pytest.mark.parametrize(
    ("changes", "num_heads", "message"),
    [
        ({}, None, "give --num-heads, a divisor of 48"),
        ({}, 7, "give --num-heads, a divisor of 48"),
        ({"y_embedder.embedding_table.weight": torch.zeros(48, 5)}, HEADS, "table of a MaskDiT"),
        ({"pos_embed": torch.zeros(3, 3)}, HEADS, "has no pos_embed of 3 dimensions"),
        ({"blocks.0.mlp.fc1.weight": torch.zeros(0, 0)}, HEADS, "has no blocks.0.mlp.fc1.weight"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(())}, None, "has no blocks.0.attn.q_norm"),
        ({"projectors.7.weight": torch.ones(())}, HEADS, "has no projectors.7.weight"),
        ({"t_embedder.mlp.0.weight": torch.zeros(48, 255)}, HEADS, "1 of another shape"),
        ({"pos_embed": torch.zeros(1, 5, 48)}, HEADS, "1 of another shape"),
    ],
)
def test_shapes_of_no_sit_are_named(changes, num_heads, message):
    state = original_sit_state(1) | changes
    with pytest.raises(UserError, match=message):
        sit_from_state(state, sit_config(state, {}, num_heads, "x"), STATS, "x")


def test_the_discriminator_has_the_depth_width_and_norm_of_its_weights():
    disc = discriminator_from_state(disc_state(), "x")
    assert disc.layers == 3 and disc.state_dict().keys() == disc_state().keys()
    for layers, channels in ((0, 8), (2, 4)):
        known = PatchGAN(layers, channels, "group")
        found = discriminator_from_state(known.state_dict(), "x")
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(found(x)[0], known(x)[0])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "has no main.0.weight"),
        ({"main.0.weight": torch.zeros(8, 3, 4, 4)}, "missing"),
        # an index is no depth: this one would be a network of 100 GB
        (
            {"main.0.weight": torch.zeros(64, 3, 4, 4), "main.999999.bias": torch.zeros(1)},
            "missing",
        ),
        ({f"main.{i}.weight": torch.zeros(3, 3, 4, 4) for i in range(4)}, "shapes of no PatchGAN"),
    ],
)
def test_shapes_of_no_discriminator_are_named(state, message):
    with pytest.raises(UserError, match=message):
        discriminator_from_state(state, "x")
