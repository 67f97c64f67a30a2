"""Numbers into a network, strictly, and the config.json beside them."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.checks.errors import UserError
from models.weights.configs import read_config
from models.weights.loading import load_strictly
from models.weights.reading import read_state
from tests.weight_files import message


def net(device="cpu"):
    with torch.device(device):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_are_loaded_in_the_networks_own_dtype(device):
    state, loaded = net().state_dict(), net(device)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    load_strictly(loaded, half, "a file", "the net")
    assert all(torch.equal(v, half[k].to(v.dtype)) for k, v in loaded.state_dict().items())
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in state.items()
    }
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_misfit_lists_three_of_each_kind_and_changes_nothing(device):
    loaded, state = net(device), net().state_dict()
    before = {k: v.clone() for k, v in loaded.state_dict().items()}
    del state["0.bias"]
    state |= {"0.weight": torch.zeros(5), **{f"extra.{i}": torch.zeros(1) for i in range(4)}}
    with pytest.raises(UserError) as caught:
        load_strictly(loaded, state, "w.pt", "the net")
    text = message(caught)
    assert "weights of w.pt do not fit the net" in text
    assert "1 missing (0.bias)" in text and "0.weight (5,) for (3, 2)" in text
    assert "4 unexpected (extra.0, extra.1, extra.2, ...)" in text
    if device == "cpu":
        assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items())


STRANGE = {
    "whole numbers": lambda v: v.to(torch.int32),
    "eight bits": lambda v: v.to(torch.float8_e4m3fn),
    "truth values": lambda v: v.bool(),
    "complex": lambda v: v.to(torch.complex64),
    "nan": lambda v: v * float("nan"),
    "too large for float32": lambda v: v.double() * 1e300,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_weights_are_finite_floats(tmp_path, kind):
    """Copied into a network, whole numbers would be taken as they are, and NaN as well."""
    net = nn.BatchNorm1d(3)
    torch.nn.init.ones_(net.bias)
    state = net.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    try:
        save_file(state | {"bias": STRANGE[kind](state["bias"])}, tmp_path / "w.safetensors")
    except KeyError:  # complex ones, before safetensors 0.7
        pytest.skip("this safetensors writes no such numbers")
    with pytest.raises(UserError, match=r"w\.safetensors.*bias") as caught:
        load_strictly(net, read_state(tmp_path / "w.safetensors"), tmp_path / "w.safetensors", "it")
    message(caught)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    load_strictly(net, {k: v.half() if v.is_floating_point() else v for k, v in before.items()},
                  "half", "it")  # fmt: skip


# ---------------------------------------------------------------- config.json


@pytest.mark.parametrize("content", ["{broken", None])
def test_a_config_that_cannot_be_read_is_one_line(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read") as caught:
        read_config(tmp_path / "config.json")
    message(caught)


@pytest.mark.parametrize("content", ["[]", "1", "null", "[" * 10**5, "\0"])
def test_a_config_that_is_no_object_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read_config(tmp_path / "config.json")
    message(caught)
