"""CUDA tensors without content, on any machine: what must be changed in torch for the time being.

Under torch's `FakeTensorMode` tensors have a shape, a type and a device, and no memory. A few
places of torch still ask for a real GPU, or decide by what the GPU can do. `fake_cuda` answers
them, and puts everything back:

autocast, GradScaler   refuse to work without a GPU, bfloat16 without one that has it
memory format          a convolution's result is NHWC if its input or its weight is: the rule of
                       cuDNN. torch's own answer depends on the cuDNN that it finds, and for
                       bfloat16 without a GPU it is wrong
attention              torch takes the plain formula where it finds no GPU; here it is the fused
                       kernel that a GPU would run
backward               utils/cost/backward.py
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils import _foreach_utils

from models.checks.errors import UserError
from utils.cost.backward import Backward

FLASH_WIDEST = 256  # largest head of the flash kernel; wider ones take the memory-efficient kernel
HALF = (torch.float16, torch.bfloat16)
OLDEST_TORCH = "2.11"  # torch 2.6 and 2.9 abort the process on such tensors


def too_old() -> str:
    """Why this torch cannot count what a run needs; "" if it can."""
    if TorchVersion(torch.__version__) >= OLDEST_TORCH:
        return ""
    return (
        f"predictions of memory and time need torch {OLDEST_TORCH} or newer, and this is "
        f"{torch.__version__}; training, sampling and evaluation do not"
    )


@contextmanager
def fake_cuda(mode: FakeTensorMode) -> Iterator[Backward]:
    """Tensors made inside on the device "cuda" have no content; yields what runs their backward.

    mode: that of `new_mode`, one for all tensors that meet.
    """
    if reason := too_old():
        raise UserError(reason)
    backward = Backward()
    with ExitStack() as stack:
        stack.enter_context(mode)  # first: it asks whether there is a GPU
        for owner, name, value in _answers():
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(backward)
        yield backward


def new_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def _answers():
    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    yield torch.cuda, "is_bf16_supported", lambda including_emulation=True: True
    # the devices' random states are left alone by checkpointing: there are none
    yield torch.cuda, "_initialized", False
    yield torch._C, "_conv_determine_backend_memory_format", _format_of_convolution
    known = _foreach_utils._foreach_supported_types
    yield _foreach_utils, "_foreach_supported_types", [*known, FakeTensor]
    yield torch.utils, "swap_tensors", _take_data
    yield F, "scaled_dot_product_attention", _attention


def _take_data(old: Tensor, new: Tensor) -> None:
    old.data = new.detach()


def _format_of_convolution(x: Tensor, weight: Tensor, backend: object) -> torch.memory_format:
    if x.ndim not in (4, 5) or torch.float64 in (x.dtype, weight.dtype):
        return torch.contiguous_format
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return last if any(_is_last(t, last) for t in (x, weight)) else torch.contiguous_format


def _is_last(t: Tensor, last: torch.memory_format) -> bool:
    """Channels-last memory. One with a single channel or pixel is both; it counts as NCHW."""
    return t.is_contiguous(memory_format=last) and not t.is_contiguous()


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """As `F.scaled_dot_product_attention`, by the kernel that a CUDA device takes."""
    assert not enable_gqa, "grouped queries are not counted"
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        query, key, value = (t.to(half) for t in (query, key, value))
    aten, options = torch.ops.aten, {"scale": scale}
    narrow = query.shape[-1] <= FLASH_WIDEST and query.shape[-1] % 8 == 0
    with torch.autocast("cuda", enabled=False):
        if query.dtype in HALF and narrow and attn_mask is None:
            fused = aten._scaled_dot_product_flash_attention
            return fused(query, key, value, dropout_p, is_causal, **options)[0]
        if attn_mask is not None:
            attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        fused = aten._scaled_dot_product_efficient_attention
        return fused(query, key, value, attn_mask, trains, dropout_p, is_causal, **options)[0]
