"""Tokens in half precision: norms, modulation, residual stream of the SiT."""

import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn as nn

from models.layers.autocast import LayerNorm, add_gated, leave_autocast, modulate, temporary_weights
from models.sit import SiT


def relative(found, wanted) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_modulation_of_half_tokens_is_the_formula_and_so_are_its_gradients():
    torch.manual_seed(0)
    h, shift, scale = torch.randn(2, 16, 32).bfloat16(), torch.randn(2, 32), torch.randn(2, 32)
    grad = torch.randn(2, 16, 32).bfloat16()
    half = [t.clone().requires_grad_() for t in (h, shift, scale)]
    exact = [t.double().requires_grad_() for t in (h, shift, scale)]
    found, wanted = modulate(*half), exact[0] * (1 + exact[2][:, None]) + exact[1][:, None]
    assert found.dtype == torch.bfloat16 and relative(found, wanted) < 3e-3
    found.backward(grad)
    for a, b in zip(half, torch.autograd.grad(wanted, exact, grad.double())):
        assert a.grad.dtype == a.dtype and relative(a.grad, b) < 4e-3


def test_scaled_gradients_of_float16_tokens_do_not_overflow():
    h = torch.full((1, 4, 8), 300.0).half()
    scale = torch.zeros(1, 8, requires_grad=True)
    modulate(h, torch.zeros(1, 8), scale).backward(torch.full_like(h, 1000.0))
    assert torch.equal(scale.grad, torch.full((1, 8), 4 * 300.0 * 1000.0))


def test_small_scales_are_not_lost_beside_one():
    h, zero = torch.ones(1, 1, 256).bfloat16() * 1.5, torch.zeros(1, 256)
    scale = torch.full((1, 256), 0.003)  # 1.003 is 1 in bfloat16; 1.5 x 1.003 = 1.5045 is not 1.5
    assert (modulate(h, zero, scale) != h).all()
    assert torch.equal(modulate(h, zero, zero), h)


@pytest.mark.parametrize("copy", [deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_layer_stay_outside_autocast(copy):
    layer = nn.Conv2d(3, 4, 1)
    leave_autocast(layer)
    twin, x = copy(layer), torch.randn(1, 3, 2, 2)
    assert type(twin) is type(layer) and twin.weight is not layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert twin(x).dtype == torch.float32 and torch.equal(twin(x), layer(x))


def test_norm_and_residual_keep_the_format_under_autocast():
    h = torch.randn(2, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert LayerNorm(8, elementwise_affine=False)(h).dtype == torch.bfloat16
    assert torch.equal(add_gated(h, torch.ones(2, 8), h), 2 * h)
    exact = torch.randn(2, 4, 8, dtype=torch.float64)
    assert torch.equal(add_gated(exact, exact[:, 0], exact), exact + exact[:, :1] * exact)


def test_weights_cast_together_are_those_of_autocast_and_so_are_their_gradients():
    net, x = (
        nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4, bias=False)),
        torch.randn(3, 8),
    )
    leave_autocast(net[2])
    with torch.autocast("cpu", torch.bfloat16):
        wanted = net(x)
        exact = torch.autograd.grad(wanted.float().sum(), list(net.parameters()))
        with temporary_weights(net, torch.bfloat16):
            assert net[0].weight.dtype == torch.bfloat16 and net[2].weight.dtype == torch.float32
            found = net(x)
        with pytest.raises(ZeroDivisionError), temporary_weights(net, torch.bfloat16):
            raise ZeroDivisionError
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    assert torch.equal(found, wanted)
    for a, b in zip(torch.autograd.grad(found.float().sum(), list(net.parameters())), exact):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.01)
    net[0].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), temporary_weights(net, torch.bfloat16):
        assert not net[0](x).requires_grad


def test_a_layer_that_leaves_autocast_keeps_its_parameters():
    layer = nn.Conv2d(3, 4, 1)
    names, x = list(layer.state_dict()), torch.randn(1, 3, 2, 2)
    plain = layer(x)
    leave_autocast(layer)
    leave_autocast(layer)
    leave_autocast(None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain)
    assert list(layer.state_dict()) == names and isinstance(layer, nn.Conv2d)
    assert layer.double()(x.double()).dtype == torch.float64


def sit():
    torch.manual_seed(0)
    net = SiT(8, 2, 4, hidden_size=64, depth=4, num_heads=4, num_classes=10, encoder_dims=(16,),
              align_depth=2, projector_dim=64)  # fmt: skip
    for p in net.parameters():  # a fresh one is the zero function
        nn.init.normal_(p, std=0.05) if p.ndim == 1 or not p.any() else None
    return net


def test_the_residual_stream_is_half_under_autocast():
    net, formats = sit(), []
    for block in net.blocks:
        block.register_forward_hook(lambda m, args, out: formats.append((args[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    assert formats == [(torch.bfloat16, torch.bfloat16)] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_fifty_steps_in_half_precision_follow_those_in_float32(dtype):
    """To the accuracy of bfloat16: losses within 1 %, weights that have moved the same way."""

    def train(enabled: bool):
        net, losses = sit(), []
        opt = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0)
        start = [p.detach().clone() for p in net.parameters()]
        for step in range(50):
            g = torch.Generator().manual_seed(step)
            x = torch.randn(8, 4, 8, 8, generator=g)
            t, y = torch.rand(8, generator=g), torch.randint(11, (8,), generator=g)
            with torch.autocast("cpu", dtype, enabled=enabled):
                v, (h,) = net(x, t, y)
            loss = (v.float() - x).square().mean() + h.float().square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        moved = torch.cat([(p - s).flatten() for p, s in zip(net.parameters(), start)])
        return torch.tensor(losses), moved.detach()

    (half, half_moved), (exact, exact_moved) = train(True), train(False)
    assert exact[-1] < 0.8 * exact[0]
    assert ((half - exact).abs() / exact).max() < 0.01
    assert torch.cosine_similarity(half_moved, exact_moved, dim=0) > 0.9
