"""Tensors on a GPU that is not there: types, memory formats and kernels are those of a GPU, and all
that was changed in torch is put back.

python -m pytest tests/utils/cost/test_fake_cuda.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _foreach_utils

from utils.cost.counter import Counter
from utils.cost.fake_cuda import fake_cuda, new_mode


@pytest.fixture
def counter():
    with fake_cuda(new_mode()), Counter() as counting:
        yield counting


def names(counter: Counter) -> list[str]:
    return [each.op.name for each in counter.counted if each.op.kernels]


def cuda(*shape: int, dtype=torch.float32, **kwargs) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda", **kwargs)


def test_everything_is_put_back():
    def state() -> list:
        return [
            torch.cuda.amp.common.amp_definitely_not_available,
            torch.cuda.is_bf16_supported,
            torch.cuda._initialized,
            torch._C._conv_determine_backend_memory_format,
            _foreach_utils._foreach_supported_types,
            torch.utils.swap_tensors,
            F.scaled_dot_product_attention,
            torch.autograd.backward,
            torch.autograd.grad,
        ]

    before = state()
    with fake_cuda(new_mode()):
        changed = [now is not old for now, old in zip(state(), before)]
    with pytest.raises(RuntimeError), fake_cuda(new_mode()):
        cuda(2, 3) @ cuda(2, 3)
    assert all(flag for flag, old in zip(changed, before) if old is not False)
    assert state() == before
    assert not torch.is_autocast_enabled("cuda") and torch.ones(2).sum().item() == 2
    (torch.ones(1, requires_grad=True) * 2).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_the_lists_of_cuda(dtype, counter):
    with torch.autocast("cuda", dtype):
        y = F.linear(cuda(2, 4), cuda(3, 4))
        assert y.dtype == dtype and F.layer_norm(y, (3,)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_convolutions_keep_nhwc(dtype, counter):
    x = cuda(2, 8, 4, 4, dtype=dtype, requires_grad=True)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = cuda(6, 8, 3, 3, dtype=dtype, requires_grad=True)
    y = F.conv2d(x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    copies = [e.op.copies for e in counter.counted if "convolution" in e.op.name]
    # backward gets the expanded gradient of a sum, which lies nowhere
    assert copies[0] == 0


def test_a_convolution_on_nchw_copies_its_images(counter):
    weight = cuda(6, 8, 3, 3)
    F.conv2d(cuda(2, 8, 4, 4), weight)
    op = counter.counted[-1].op
    assert op.copies == 2 * 4 * (2 * 8 * 16 + 2 * 6 * 4)
    assert op.bytes == op.copies + 4 * (2 * 8 * 16 + 2 * 6 * 4 + weight.numel())


KERNELS = {
    (torch.bfloat16, 72): "_scaled_dot_product_flash_attention",
    (torch.bfloat16, 512): "_scaled_dot_product_efficient_attention",
    (torch.float32, 72): "_scaled_dot_product_efficient_attention",
}


@pytest.mark.parametrize(("dtype", "width"), KERNELS)
def test_attention_is_one_kernel(dtype, width, counter):
    q = cuda(2, 4, 16, width, dtype=dtype, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q).sum().backward()
    name = KERNELS[dtype, width]
    assert [n for n in names(counter) if "attention" in n] == [name, f"{name}_backward"]


def test_masked_attention_has_the_shape_of_its_queries(counter):
    q, mask = cuda(2, 4, 16, 8), cuda(1, 1, 16, 16)
    assert F.scaled_dot_product_attention(q, q, q, attn_mask=mask).shape == q.shape


def test_lists_of_tensors_take_few_kernels(counter):
    params = [nn.Parameter(cuda(10)) for _ in range(100)]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(params, fused=True)
    counter.counted.clear()
    nn.utils.get_total_norm([p.grad for p in params])
    optimizer.step()
    assert "_fused_adamw_" in names(counter)
    assert names(counter).count("linalg_vector_norm") <= 1  # of the norms of all


def test_a_module_can_change_its_format(counter):
    net = nn.Conv2d(8, 8, 3, device="cuda").to(memory_format=torch.channels_last)
    assert net.weight.is_contiguous(memory_format=torch.channels_last)
    assert net.half().weight.dtype == torch.float16


def test_the_loss_scale_of_fp16_works_without_reading_it_back(counter):
    p = nn.Parameter(cuda(3))
    optimizer, scaler = torch.optim.AdamW([p], fused=True), torch.amp.GradScaler("cuda")
    scaler.scale(p.sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert "_amp_update_scale_" in names(counter)
    assert not any(each.op.waits for each in counter.counted)
