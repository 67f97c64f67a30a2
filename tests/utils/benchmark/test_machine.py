"""Counted FLOPs against counts by hand, and the facts about a device.

python -m pytest tests/utils/benchmark/test_machine.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.benchmark import machine
from utils.benchmark.machine import count_flops
from utils.cost.fake_cuda import too_old
from utils.precision import DTYPES

CPU = torch.device("cpu")


def test_a_linear_layer_and_its_gradients():
    net, x = nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    product = 2 * 4 * 8 * 16
    assert count_flops(lambda: net(x)) == product
    assert count_flops(lambda: net(x).sum().backward()) == 3 * product


def test_a_convolution():
    net, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8)
    assert count_flops(lambda: net(x)) == 2 * 2 * 5 * 8 * 8 * 3 * 9


def test_attention_counts_on_the_cpu_as_on_a_gpu():
    """Two products forward; backward the flash kernels compute one of them again: five."""
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    product = 2 * 2 * 3 * 16 * 16 * 8
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    both = count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert both == 7 * product


def test_a_gradient_taken_inside_a_forward_pass_counts():
    """As that of LPIPS in float16 is."""

    class AtOnce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                ctx.save_for_backward(*torch.autograd.grad(net(leaf).sum(), leaf))
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    net, first = nn.Linear(8, 16).requires_grad_(False), nn.Linear(4, 8)
    counted = count_flops(lambda: AtOnce.apply(first(torch.ones(3, 4))).backward())
    assert counted == 2 * 2 * 3 * 8 * 16 + 2 * 2 * 3 * 4 * 8


@pytest.mark.skipif(bool(too_old()), reason=too_old())
def test_what_is_compiled_counts_and_is_not_compiled_for_it():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    net = nn.Linear(8, 16)
    net.compile(backend=backend)
    x = torch.randn(4, 8)
    assert count_flops(lambda: net(x)) == 2 * 4 * 8 * 16 and not compiled
    net(x)
    assert len(compiled) == 1


def test_products_are_timed_in_each_format_and_tf32_stays_as_it_is_set(monkeypatch):
    monkeypatch.setitem(machine.SIDE, "cpu", 64)
    for tf32 in (True, False):
        found = machine.matmul_peak(CPU, set(DTYPES), tf32)
        assert set(found) == set(DTYPES) and all(rate > 0 for rate in found.values())
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
    machine.matmul_peak(CPU, {"fp32"}, tf32=False)


def test_facts_about_this_machine():
    facts = machine.describe_device(CPU)
    assert facts["device"] and facts["threads"] >= 1
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "commit" in facts["versions"]
    held = torch.ones(2**25)  # 128 MiB
    assert machine.peak_memory(CPU)["peak_memory_gib"] > held.nbytes / 2**30


@pytest.mark.gpu
def test_the_peak_of_a_gpu_is_what_its_tensors_held():
    gpu = torch.device("cuda")
    machine.forget_peak(gpu)
    before = machine.peak_memory(gpu)["peak_memory_gib"]
    torch.zeros(2**28, device=gpu)  # 1 GiB
    after = machine.peak_memory(gpu)
    assert after["peak_memory_gib"] == pytest.approx(before + 1, rel=0.01)
    assert after["peak_memory_reserved_gib"] >= after["peak_memory_gib"]
