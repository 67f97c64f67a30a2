"""What trains a network: accumulation under a loss scale, clipping, AdamW, freezing."""

import copy
import math
from itertools import chain

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.config.schema import OptimConfig
from utils.training.trained_network import TrainedNetwork, only_training


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def whole_numbers(*shape):
    """Small integers as floats: sums and products of them are exact, in any order."""
    return torch.randint(-3, 4, shape).float()


def linear(inputs=4, outputs=2):
    net = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(whole_numbers(*p.shape))
    return net


def make(accelerator, net=None, precision="fp32", **optim):
    return TrainedNetwork(
        net or linear(), OptimConfig(**{"clip": 0.0} | optim), accelerator, precision
    )


def backward(trained, x, target, share=1.0):
    trained.backward(share * (trained.ddp(x) - target).square().mean())


def gradients(trained):
    return [p.grad.clone() for p in trained.params]


def weights(trained):
    return [p.detach().clone() for p in trained.params]


def all_equal(a, b):
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b))


# --------------------------------------------------------------------------------------
# Accumulation


def thawed_copy(net):
    return copy.deepcopy(net).requires_grad_(True)


def big_batch_gradients(net, x, target):
    net = thawed_copy(net)
    (net(x) - target).square().mean().backward()
    return [p.grad for p in net.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_micro_batches_give_exactly_the_gradient_of_the_big_batch(accelerator, precision, parts):
    """Integers and powers of two: exact arithmetic, so any lost micro-batch or scale would show."""
    trained = make(accelerator, precision=precision)
    x, target = whole_numbers(8, 4), whole_numbers(8, 2)
    expected = big_batch_gradients(trained.net, x, target)
    with only_training(trained):
        for a, b in trained.micro_batches(list(zip(x.chunk(parts), target.chunk(parts)))):
            backward(trained, a, b, share=1 / parts)
        trained.step(0)
    assert trained.scaler.is_enabled() == (precision == "fp16")
    assert all_equal(gradients(trained), expected)


def test_three_networks_that_step_between_each_others_micro_batches_lose_nothing(accelerator):
    """The reference's fault: one network's clip un-scaled the gradients that the
    others had gathered so far, and their earlier micro-batches vanished."""
    networks = [make(accelerator, linear(), "fp16") for _ in range(3)]
    x, target = whole_numbers(8, 4), whole_numbers(8, 2)
    parts = list(zip(x.chunk(4), target.chunk(4)))
    expected = [big_batch_gradients(trained.net, x, target) for trained in networks]
    for trained in networks:
        trained.freeze(False)
    for a, b in parts[:2]:
        for trained in networks:
            backward(trained, a, b, share=1 / 4)
    for number, trained in enumerate(networks):
        for a, b in parts[2:]:
            backward(trained, a, b, share=1 / 4)
        trained.step(0)
        assert all_equal(gradients(trained), expected[number]), number


def test_micro_batches_yields_every_part_in_order(accelerator):
    trained = make(accelerator)
    assert list(trained.micro_batches([3, 1, 2])) == [3, 1, 2]


# --------------------------------------------------------------------------------------
# Loss scale


def test_scaled_float16_keeps_gradients_that_float16_would_lose(accelerator):
    """Gradients near 1e-8 are zero in float16; at the loss scale they survive, un-scaled after."""
    x = torch.rand(16, 4) + 0.5

    def gradient(precision, autocast):
        torch.manual_seed(0)
        trained = make(accelerator, nn.Linear(4, 2), precision)
        with only_training(trained):
            with torch.autocast("cpu", torch.float16, enabled=autocast):
                out = trained.ddp(x)
            trained.backward(1e-8 * out.float().mean())
            trained.step(0)
        return trained.net.weight.grad

    exact = gradient("fp32", autocast=False)
    assert 1e-9 < exact.abs().max() < 5e-8
    assert torch.allclose(gradient("fp16", autocast=True), exact, rtol=2e-3)
    assert not gradient("fp32", autocast=True).any()  # without a scale they are gone


def test_an_overflow_halves_the_scale_and_skips_the_step_of_that_network_alone(accelerator):
    one, other = make(accelerator, precision="fp16"), make(accelerator, precision="fp16")
    scale = one.scaler.get_scale()
    before_one, before_other = weights(one), weights(other)
    x, target = whole_numbers(8, 4), whole_numbers(8, 2)
    for trained, factor in ((one, 1e38), (other, 1.0)):
        with only_training(trained):
            backward(trained, x, target, share=factor)
            norm = trained.step(0)
        assert math.isfinite(norm) == (trained is other)
    assert one.scaler.get_scale() == scale / 2 and other.scaler.get_scale() == scale
    assert all_equal(weights(one), before_one)
    assert not all_equal(weights(other), before_other)
    with only_training(one):  # and it recovers
        backward(one, x, target)
        assert one.step(1).isfinite()
    assert not all_equal(weights(one), before_one)


def test_each_scaler_counts_its_own_network_steps(accelerator):
    """One scaler for all three would count three updates a step."""
    one, other = make(accelerator, precision="fp16"), make(accelerator, precision="fp16")
    x, target = whole_numbers(8, 4), whole_numbers(8, 2)
    for step in range(3):
        for trained in (one, other)[: 1 if step else 2]:
            with only_training(trained):
                backward(trained, x, target)
                trained.step(step)
    assert one.scaler.state_dict()["_growth_tracker"] == 3
    assert other.scaler.state_dict()["_growth_tracker"] == 1


# --------------------------------------------------------------------------------------
# Clipping, AdamW, warm-up


def norm_of(tensors):
    return math.sqrt(sum(float(v) ** 2 for t in tensors for v in t.flatten()))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_clip_is_of_the_unscaled_global_norm_which_is_returned(accelerator, precision, clip):
    """Too long: scaled to `clip`. Short enough, or clip = 0: left as it is, bit by bit."""
    trained = make(accelerator, precision=precision, clip=clip)
    x, target = whole_numbers(8, 4), whole_numbers(8, 2)
    raw = big_batch_gradients(trained.net, x, target)
    with only_training(trained):
        backward(trained, x, target)
        norm = trained.step(0)
    assert norm.item() == pytest.approx(norm_of(raw), rel=1e-6)
    assert norm.item() > 0.5
    if clip == 0.5:
        assert norm_of(gradients(trained)) == pytest.approx(0.5, rel=1e-4)
        for clipped, g in zip(gradients(trained), raw):
            assert torch.allclose(clipped, g * (0.5 / norm), rtol=1e-5)
    else:
        assert all_equal(gradients(trained), raw)


def test_clip_0_touches_no_gradient(accelerator, monkeypatch):
    """Not even to multiply it by 1, which reads and writes every gradient once more."""
    for name in ("clip_grad_norm_", "clip_grads_with_norm_"):
        monkeypatch.setattr(nn.utils, name, None)
    trained = make(accelerator, clip=0.0)
    with only_training(trained):
        backward(trained, whole_numbers(8, 4), whole_numbers(8, 2))
        assert trained.step(0) > 0


def test_clip_counts_this_network_alone(accelerator):
    small, huge = make(accelerator, clip=1e3), make(accelerator, clip=1e3)
    x, target = whole_numbers(8, 4), whole_numbers(8, 2)
    expected = big_batch_gradients(small.net, x, target)
    for trained in (small, huge):
        trained.freeze(False)
        backward(trained, x, target, share=1e6 if trained is huge else 1.0)
    small.step(0)
    assert all_equal(gradients(small), expected)


def stepped(accelerator, in_kernel, precision, clip, share=1.0):
    """Three steps of the same network, clipped by the optimizer's kernel, as on GPUs, or before."""
    torch.manual_seed(0)
    trained = make(accelerator, nn.Linear(40, 20), precision, clip=clip, lr=0.1)
    trained.clips_in_kernel = in_kernel
    norms = []
    for step in range(3):
        with only_training(trained):
            backward(trained, torch.randn(8, 40), torch.randn(8, 20), share)
            norms.append(trained.step(step))
    moments = [m[name] for m in trained.opt.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return [*weights(trained), *moments], gradients(trained), norms


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_in_the_kernel_is_clipping_before_it(accelerator, precision):
    """To float32 rounding: the one divides, the other multiplies by the reciprocal. Gradients that
    are short enough, and clip = 0, agree bit by bit. The norm is that before clipping."""
    for clip, exact in ((0.01, False), (1e9, True), (0.0, True)):
        kernel, before = (stepped(accelerator, way, precision, clip) for way in (True, False))
        assert kernel[2][0] == before[2][0] > 0.1
        for a, b in zip(chain(*kernel), chain(*before)):
            assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-6, atol=1e-7)
        if clip == 0.01:
            assert norm_of(kernel[1]) == pytest.approx(0.01, rel=1e-4)


def test_clipping_in_the_kernel_writes_no_gradient_before(accelerator, monkeypatch):
    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", None)
    states, clipped, _ = stepped(accelerator, True, "fp32", 0.01)
    assert all(t.isfinite().all() for t in states + clipped)


def test_the_kernel_clips_on_gpus_and_float32_alone(accelerator):
    """On the CPU results are those of clipping before, to the last bit."""
    assert not make(accelerator).clips_in_kernel
    for dtype, expected in ((torch.float32, True), (torch.float64, False)):
        net = linear().to(dtype)
        assert TrainedNetwork(net, OptimConfig(), OnGpu(), "fp32").clips_in_kernel == expected


class OnGpu:
    """An accelerator whose networks stay where they are."""

    device = torch.device("cuda")

    def prepare_model(self, net):
        return net


@pytest.mark.gpu
@pytest.mark.parametrize("guarded", [False, True])
def test_a_step_on_a_gpu_clips_and_waits_for_nothing(guarded):
    """Steps on the CPU, which clips before the kernel, to rounding."""
    ends = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        net = nn.Linear(40, 20)
        x = torch.randn(3, 8, 40)
        accelerator = OnGpu()
        accelerator.device = torch.device(device)
        trained = TrainedNetwork(net.to(device), OptimConfig(clip=0.01), accelerator, "bf16")
        assert trained.clips_in_kernel == (device == "cuda")
        if guarded:
            trained.skip_nonfinite()
        for step in range(3):
            with only_training(trained):
                trained.backward(net(x[step].to(device)).square().mean())
                torch.cuda.set_sync_debug_mode("error")
                trained.step(step)
                torch.cuda.set_sync_debug_mode("default")
        ends.append([t.cpu() for t in (*weights(trained), *gradients(trained))])
    for a, b in zip(*ends):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


class NoHostSync(TorchDispatchMode):
    """Raises where the host reads a number from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("guarded", [False, True])
def test_a_step_reads_nothing_back(accelerator, precision, guarded):
    trained = make(accelerator, nn.Sequential(linear(), nn.BatchNorm1d(2)), precision, clip=0.1)
    trained.clips_in_kernel = True
    if guarded:
        trained.skip_nonfinite()
    for step in range(2):
        with only_training(trained):
            backward(trained, whole_numbers(8, 4), whole_numbers(8, 2))
            with NoHostSync():
                trained.step(step)


@pytest.mark.parametrize("in_kernel", [False, True])
def test_what_the_guard_sees_leaves_out_the_update_under_a_loss_scale_too(accelerator, in_kernel):
    """A running statistic is not finite, gradients are: the scale's own flag is not set."""
    net = nn.Sequential(linear(), nn.BatchNorm1d(2))
    trained = make(accelerator, net, "fp16", clip=0.1, lr=0.1)
    trained.clips_in_kernel = in_kernel
    trained.skip_nonfinite()
    before = weights(trained)
    with only_training(trained):
        backward(trained, whole_numbers(8, 4), whole_numbers(8, 2))
        net[1].running_var.fill_(math.inf)
        trained.step(0)
    assert trained.left_out and all_equal(weights(trained), before)
    assert net[1].running_var.isfinite().all()
    with only_training(trained):
        backward(trained, whole_numbers(8, 4), whole_numbers(8, 2))
        trained.step(1)
    assert not trained.left_out and not all_equal(weights(trained), before)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_step_is_adamw_written_out(accelerator, precision):
    """Decoupled weight decay, bias correction, the learning rate of the warm-up."""
    o = {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.2, "warmup_steps": 3}
    trained = make(accelerator, precision=precision, **o)
    x, target = whole_numbers(8, 4), whole_numbers(8, 2)
    values = [w.double() for w in weights(trained)]
    m, v = ([torch.zeros_like(w) for w in values] for _ in range(2))
    for step in range(5):
        with only_training(trained):
            backward(trained, x, target)
            trained.step(step)
        lr = 0.1 * min(1, (step + 1) / 3)
        for i, g in enumerate(g.double() for g in gradients(trained)):
            m[i] = 0.8 * m[i] + 0.2 * g
            v[i] = 0.9 * v[i] + 0.1 * g**2
            m_hat, v_hat = m[i] / (1 - 0.8 ** (step + 1)), v[i] / (1 - 0.9 ** (step + 1))
            values[i] = values[i] * (1 - lr * 0.2) - lr * m_hat / (v_hat.sqrt() + 1e-3)
        for found, expected in zip(weights(trained), values):
            assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5), step


@pytest.mark.parametrize(
    ("warmup", "expected"), [(0, [1, 1, 1]), (1, [1, 1, 1]), (4, [1 / 4, 2 / 4, 3 / 4])]
)
def test_warm_up_is_linear_and_then_constant(accelerator, warmup, expected):
    trained = make(accelerator, lr=0.5, warmup_steps=warmup)
    rates = []
    for step in (0, 1, 2, 3, 4, 1000):
        with only_training(trained):
            backward(trained, whole_numbers(2, 4), whole_numbers(2, 2))
            trained.step(step)
        rates.append(trained.opt.param_groups[0]["lr"])
        assert trained.lr == rates[-1]
    assert rates == pytest.approx([0.5 * r for r in [*expected, 1, 1, 1]])


# --------------------------------------------------------------------------------------
# Freezing


def with_frozen_layer():
    net = nn.Sequential(linear(4, 4), linear(4, 2))
    net[0].requires_grad_(False)
    return net


def trainable(trained):
    return [p.requires_grad for p in trained.net.parameters()]


def test_only_training_thaws_what_was_trainable_and_freezes_it_again(accelerator):
    """A parameter frozen before the trained was built stays frozen for ever, and never moves."""
    trained = make(accelerator, with_frozen_layer(), lr=0.1, weight_decay=0.5)
    frozen = [p.clone() for p in trained.net[0].parameters()]
    assert trainable(trained) == [False] * 4
    for step in range(2):
        with only_training(trained):
            assert trainable(trained) == [False, False, True, True]
            backward(trained, whole_numbers(8, 4), whole_numbers(8, 2))
            trained.step(step)
        assert trainable(trained) == [False] * 4
    assert all_equal([p.detach() for p in trained.net[0].parameters()], frozen)
    assert all(p.grad is None for p in trained.net[0].parameters())
    assert len(trained.params) == 2 == len(trained.opt.param_groups[0]["params"])


def test_a_frozen_network_passes_gradients_on_and_keeps_none(accelerator):
    """In the VAE phase the loss goes through SiT and discriminator."""
    trained = make(accelerator)
    x = whole_numbers(8, 4).requires_grad_()
    trained.net(x).square().mean().backward()
    assert x.grad.any()
    assert all(p.grad is None for p in trained.net.parameters())


def test_training_one_network_leaves_the_other_frozen(accelerator):
    one, other = make(accelerator), make(accelerator)
    with only_training(one):
        (one.ddp(whole_numbers(8, 4)).sum() + other.net(whole_numbers(8, 4)).sum()).backward()
    assert all(p.grad is not None for p in one.params)
    assert all(p.grad is None for p in other.params)


def test_gradients_stay_readable_after_the_phase_and_the_next_starts_fresh(accelerator):
    trained = make(accelerator, lr=0.0)
    x, target = whole_numbers(8, 4), whole_numbers(8, 2)
    for step in range(2):  # twice the same: nothing of the first is left in the second
        with only_training(trained):
            assert all(p.grad is None for p in trained.params)
            backward(trained, x, target)
            trained.step(step)
        assert all_equal(gradients(trained), big_batch_gradients(trained.net, x, target))


# --------------------------------------------------------------------------------------
# State


def train(trained, batches, first):
    for step, (x, target) in enumerate(batches, start=first):
        with only_training(trained):
            backward(trained, x, target)
            trained.step(step)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_going_on_from_the_state_dict_is_bit_equal(accelerator, precision, tmp_path):
    """Moments and loss scale, through a file of plain tensors."""
    batches = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(4)]
    if precision == "fp16":  # the first overflows: the scale is halved
        batches[0] = (batches[0][0] * 1e30, batches[0][1])
    whole = make(accelerator, thawed_copy(net := linear()), precision, lr=0.1)
    train(whole, batches, 0)
    first = make(accelerator, net, precision, lr=0.1)
    train(first, batches[:2], 0)
    torch.save(first.state_dict(), tmp_path / "optim.pt")
    again = make(accelerator, thawed_copy(first.net), precision, lr=0.1)
    again.load_state_dict(torch.load(tmp_path / "optim.pt", weights_only=True))
    train(again, batches[2:], 2)
    assert all_equal(weights(again), weights(whole))
    assert again.scaler.state_dict() == whole.scaler.state_dict()
    if precision == "fp16":
        assert whole.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize(("before", "after"), [("fp16", "bf16"), ("bf16", "fp16")])
def test_a_run_may_go_on_in_another_precision(accelerator, before, after):
    trained = make(accelerator, precision=before)
    train(trained, [(whole_numbers(8, 4), whole_numbers(8, 2))], 0)
    other = make(accelerator, precision=after)
    other.load_state_dict(trained.state_dict())
    train(other, [(whole_numbers(8, 4), whole_numbers(8, 2))], 1)
    assert other.scaler.is_enabled() == (after == "fp16")
    assert other.opt.state_dict()["state"][0]["step"] == 2
