"""The backward pass in Python gives what torch's engine gives, and keeps no more memory.

python -m pytest tests/utils/cost/test_backward.py        (true tensors on the CPU)
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from utils.cost.backward import Backward
from utils.cost.counter import Counter


class Doubled(torch.autograd.Function):
    """2 x + number * y, with an argument that is no tensor in between and an output that may get no
    gradient."""

    @staticmethod
    def forward(ctx, x, number, y):
        ctx.number = number
        ctx.save_for_backward(x)
        return 2 * x + number * y, x.sum()

    @staticmethod
    def backward(ctx, grad, grad_sum):
        (x,) = ctx.saved_tensors
        return 2 * grad + grad_sum * torch.ones_like(x), None, ctx.number * grad


class Net(nn.Module):
    """A value that is used twice, broadcasting, two types, a checkpoint, an unused branch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.gate = nn.Parameter(torch.randn(8, 1, 1))
        self.head = nn.Linear(8, 5)
        self.unused = nn.Linear(8, 1)

    def forward(self, x):
        h = self.conv(x)
        h = h + checkpoint(self.block, h, use_reentrant=False) * self.gate
        h, _ = Doubled.apply(h, 3.0, F.silu(h))
        first, second = h.flatten(2).mean(2).double().chunk(2)
        self.unused(h.flatten(2).mean(2))
        return self.head(torch.cat([first, second]).float()).square().mean()

    def block(self, h):
        return F.silu(self.norm(h))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def gradients(net: Net, x: torch.Tensor) -> dict[str, torch.Tensor]:
    net.zero_grad()
    for part in x.chunk(2):  # the second adds to the first
        net(part).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_the_gradients_are_those_of_torchs_engine(net):
    x = torch.randn(4, 3, 6, 6)
    expected = gradients(net, x)
    with Backward():
        found = gradients(net, x)
    assert found.keys() == expected.keys() and "unused.weight" not in found
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_gradients_of_inputs_alone_leave_the_parameters_alone(net):
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(net(x), x)
    with Backward():
        (found,) = torch.autograd.grad(net(x), x)
    torch.testing.assert_close(found, expected)
    assert x.grad is None and all(p.grad is None for p in net.parameters())


def test_what_backward_has_used_is_freed_on_the_way(net):
    """Beside torch's engine: the same largest moment, and the same at the end."""
    net.requires_grad_(True)
    x, peaks, ends = torch.randn(4, 3, 32, 32), [], []
    for walk in (None, Backward()):
        net.zero_grad()
        counter = Counter(old=[x, *net.parameters()])
        with counter:
            if walk:
                with walk:
                    net(x).backward()
            else:
                net(x).backward()
        peaks.append(max(counter.curve))
        ends.append(counter.alive)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.02) and ends[0] == ends[1]


def test_a_graph_is_used_once(net):
    with Backward():
        loss = net(torch.randn(2, 3, 6, 6))
        loss.backward()
        with pytest.raises(AssertionError, match="second backward"):
            loss.backward()


def test_outside_torchs_engine_is_back(net):
    before = torch.autograd.backward, torch.autograd.grad
    with pytest.raises(AssertionError, match="leaves"), Backward():
        torch.autograd.grad(net(torch.randn(2, 3, 6, 6)), net.gate * 2)
    assert (torch.autograd.backward, torch.autograd.grad) == before
