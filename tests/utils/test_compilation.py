"""Compiled networks: static sizes, a list of graphs for each, numbers as before."""

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

from tests.tiny import tiny_config
from utils import compilation
from utils.training import networks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(x).square()

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


@pytest.fixture
def net(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch.manual_seed(0)
    return Net()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_forward_and_methods_are_compiled_in_place_with_the_same_results(net):
    eager, x = copy.deepcopy(net), torch.randn(4, 3)
    compilation.compile_network(net, "decode")
    assert torch.equal(net(x), eager(x)) and torch.equal(net.decode(x), eager.decode(x))
    assert graphs() == 2
    assert counters["graph_break"] == {}
    assert net.state_dict().keys() == eager.state_dict().keys()


def test_each_size_is_compiled_once_and_leaves_the_others(net):
    """By default torch would compile the second size for all sizes, slower for the first."""
    compilation.compile_network(net)
    for number in (8, 3, 5, 8, 3, 5):
        net(torch.randn(number, 3))
    assert graphs() == 3


def test_modes_of_training_are_compiled_once_each(net):
    compilation.compile_network(net)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            net.requires_grad_(False)
            net(torch.randn(2, 3, requires_grad=True)).sum().backward()
            net.requires_grad_(True)
            net(torch.randn(2, 3)).sum().backward()
            with torch.no_grad():
                net(torch.randn(2, 3))
    assert graphs() == 3


def test_a_torch_with_one_list_for_all_networks_keeps_all_their_graphs(net, monkeypatch):
    newest = torch.compile

    def older(model=None, *, dynamic=None, backend="inductor", mode=None):  # torch 2.6 to 2.13
        return newest(model, dynamic=dynamic, backend=backend, mode=mode)

    monkeypatch.setattr(torch, "compile", older)
    # monkeypatch would leave the entry of this config hidden
    with torch._dynamo.config.patch({compilation.list_length(torch._dynamo.config): 8}):
        compilation.compile_network(net)
        for number in range(2, 14):
            net(torch.randn(number, 3))
    assert graphs() == 12


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch keeps one list of graphs for all networks of a class",
)
def test_sizes_of_a_copy_do_not_use_up_the_graphs_of_a_network(net, monkeypatch):
    """EMA and SiT are of one class: the many sizes of previews must leave training compiled."""
    monkeypatch.setattr(compilation, "MOST_GRAPHS", 2)
    ema = copy.deepcopy(net)
    compilation.compile_network(ema)
    compilation.compile_network(net)
    for number in (1, 2, 3):
        ema(torch.randn(number, 3))
    assert graphs() == 2  # the third runs uncompiled
    net(torch.randn(64, 3))
    assert graphs() == 3


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "ranks", "used", "line"),
    [
        ("", True, 2, False, ""),
        ("run.compile_mode=reduce-overhead", True, 1, False, "run.compile=false"),
        ("run.compile_mode=reduce-overhead run.compile=true", False, 1, False, "no GPU"),
        ("run.compile_mode=reduce-overhead run.compile=true", True, 1, True, ""),
        ("run.compile_mode=reduce-overhead run.compile=true", True, 2, True, "discriminator"),
    ],
)
def test_where_cuda_graphs_are_not_used_one_line_says_so(
    capsys, overrides, on_gpu, ranks, used, line
):
    c = tiny_config(*overrides.split())
    assert networks._uses_cuda_graphs(c, on_gpu, ranks) == used
    out = capsys.readouterr().out
    assert line in out and out.count("\n") == bool(line)


def test_what_runs_between_steps_and_what_joins_ranks_has_no_cuda_graphs(monkeypatch):
    """All else has. A preview inside a step's graphs would be recorded after them, again and
    again."""
    made = {}
    monkeypatch.setattr(
        networks,
        "compile_network",
        lambda net, *names, cuda_graphs: made.update({net: cuda_graphs}),
    )
    nets: Any = SimpleNamespace(
        vae="vae", sit="sit", lpips="lpips", perceptual="perceptual", disc="disc",
        encoders=["encoder"], cuda_graphs=True,
    )  # fmt: skip
    c = tiny_config()
    networks._compile(nets, c, 1)
    assert made == dict.fromkeys(("vae", "sit", "lpips", "perceptual", "encoder", "disc"), True)
    networks._compile(nets, c, 2)
    assert made["disc"] is False
    networks._compile(nets, tiny_config("disc.norm=group", "disc.channels=16"), 2)
    assert made["disc"] is True
