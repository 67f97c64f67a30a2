"""FLOPs, bytes and kernels of single operations, computed by hand; where the host waits.

python -m pytest tests/utils/cost/test_operations.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.layers.group_norm import group_norm_silu
from utils.cost.counter import Counter
from utils.cost.fake_cuda import fake_cuda, new_mode
from utils.cost.operations import Operation
from utils.training.phases import observed, phase

FLOAT, BF16 = 4, 2


@pytest.fixture
def counter():
    with fake_cuda(new_mode()), Counter() as counting:
        yield counting


def cuda(*shape: int, dtype=torch.float32, **kwargs) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda", **kwargs)


def last(counter: Counter) -> Operation:
    """The last operation that is a kernel."""
    return [each.op for each in counter.counted if each.op.kernels][-1]


def test_a_network_counted_by_hand(counter):
    """Two layers and a ReLU, 5 vectors: three products forward, two for each layer backward, but
    none for the gradient of the input."""
    n, a, b, c = 5, 8, 16, 4
    with torch.device("cuda"):
        first, second = nn.Linear(a, b, bias=False), nn.Linear(b, c, bias=False)
    net, x = nn.Sequential(first, nn.ReLU(), second), cuda(n, a)
    counter.counted.clear()
    net(x).sum().backward()
    matrices = [each.op for each in counter.counted if each.op.kind == "matrix"]
    assert sum(op.flops for op in matrices) == 2 * n * (a * b + b * c) + 2 * n * (a * b + 2 * b * c)
    assert not any(op.half for op in matrices)
    assert (matrices[0].read, matrices[0].written) == (FLOAT * (n * a + a * b), FLOAT * n * b)


def test_half_precision_is_counted_apart_and_casts_are_seen(counter):
    weight = cuda(16, 8)
    with torch.autocast("cuda", torch.bfloat16):
        F.linear(cuda(5, 8, dtype=torch.bfloat16), weight)
    casts = [each.op for each in counter.counted if each.op.casts]
    assert [op.casts for op in casts] == [(FLOAT + BF16) * weight.numel()]
    assert last(counter).half and last(counter).flops == 2 * 5 * 8 * 16


def test_views_and_allocations_are_no_kernels(counter):
    x = cuda(4, 6)
    x.view(24), x.t(), x[:2], x.expand(3, 4, 6), x.detach(), x.unflatten(1, (2, 3))
    torch.empty_like(x)
    assert not any(each.op.kernels or each.op.bytes for each in counter.counted)


def test_repeated_values_are_read_once_and_overwritten_ones_not_at_all(counter):
    _ = cuda(4, 6) + cuda(6)
    assert (last(counter).read, last(counter).written) == (FLOAT * (24 + 6), FLOAT * 24)
    _ = cuda(1, 6).expand(4, 6) * cuda(4, 6)
    assert last(counter).read == FLOAT * (24 + 6)
    cuda(4, 6).zero_()
    assert (last(counter).read, last(counter).written) == (0, FLOAT * 24)
    cuda(4, 6).add_(cuda(4, 6))
    assert (last(counter).read, last(counter).written) == (FLOAT * 48, FLOAT * 24)


def test_a_change_of_the_memory_format_is_a_layout_copy(counter):
    cuda(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert last(counter).copies == last(counter).bytes == 2 * FLOAT * 120
    cuda(2, 3, 4, 5).clone()
    assert last(counter).copies == 0


def test_norms_read_their_input_twice(counter):
    size = FLOAT * 2 * 8 * 16
    x = cuda(2, 8, 4, 4, requires_grad=True)
    y = F.group_norm(x, 2)
    assert size * 2 <= last(counter).read < size * 2.1
    y.sum().backward()
    backward = next(e.op for e in counter.counted if e.op.name == "native_group_norm_backward")
    assert backward.read >= 2 * size


def test_the_group_norm_of_this_repository_is_known(counter):
    x = cuda(2, 8, 4, 4, dtype=torch.bfloat16)
    group_norm_silu(x, cuda(8), cuda(8), 2, 1e-6, True)
    op = last(counter)
    assert op.name == "group_norm_silu" and op.kind == "reduction" and op.kernels == 3


def test_a_convolutions_gradients_are_kernels_of_their_own(counter):
    x = cuda(2, 8, 4, 4, requires_grad=True).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, cuda(6, 8, 3, 3, requires_grad=True), cuda(6, requires_grad=True))
    forward = last(counter)
    y.backward(torch.empty_like(y))
    backward = next(e.op for e in counter.counted if e.op.name == "convolution_backward")
    assert backward.flops == 2 * forward.flops == 2 * (2 * 2 * 6 * 4 * 8 * 9)
    assert backward.kernels == 3 and backward.copies == 0


def test_operations_belong_to_the_innermost_phase(counter):
    with observed(counter):
        x = cuda(3).zero_()
        with phase("sit"):
            x = x + 1
            with phase("optimizer"):
                x = x * 2
            x - 3
    found = [(each.op.name, each.phase) for each in counter.counted if each.op.kernels]
    expected = [("zero_", "other"), ("add", "sit"), ("mul", "optimizer"), ("sub", "sit")]
    assert found == expected


# --------------------------------------------------------------------------------------
# Waits.

WAITS = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.sum().tolist(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x[:, 0] > 0],
    "masked values": lambda x: x.index_put_((x > 0,), x.flatten()),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.empty(3).to("cuda"),
    "a tensor of a number": lambda x: torch.tensor(2.0, device="cuda"),
    "equal": lambda x: torch.equal(x, x),
}
NONE = {
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "a number under a mask": lambda x: x.index_put_((x > 0,), x.new_zeros(())),
    "masked_fill": lambda x: x.masked_fill_(x > 0, 0.0),
    "index": lambda x: x[torch.zeros(2, dtype=torch.long, device="cuda")],
    "on the host": lambda x: torch.ones(3).sum(),
    "full": lambda x: torch.full((), 2.0, device="cuda"),
    "asynchronous": lambda x: torch.empty(3).to("cuda", non_blocking=True),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_of_the_host_is_seen(what, counter):
    WAITS[what](cuda(4, 6))
    assert sum(each.op.waits for each in counter.counted) == 1


@pytest.mark.parametrize("what", NONE)
def test_what_looks_like_a_wait_and_is_none(what, counter):
    NONE[what](cuda(4, 6))
    assert not any(each.op.waits for each in counter.counted)


def test_a_mask_is_taken_to_be_true_everywhere(counter):
    x = cuda(4, 6)
    assert x[x > 0].shape == (24,) and x[x[:, 0] > 0].shape == (4, 6)
    assert (x > 0).nonzero().shape == (24, 2)
