"""Group norm, with or without SiLU: half precision in and out, float32 statistics.

Autocast runs torch's group norm in float32, which in a VAE moves more bytes than all convolutions.
In half precision, torch's CUDA kernels round the statistics that the gradient needs, and before
torch 2.15 they copy channels-last tensors to NCHW. The kernels here do neither, and keep only their
input for the backward pass.

N batch, C channels, G groups; tensors (N, C, ...).
"""

import math
import warnings
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose output has the number format and memory format of its input."""

    silu = False

    def forward(self, input: Tensor) -> Tensor:
        if input.is_cuda and input.dtype != torch.float64 and not torch.compiler.is_compiling():
            settings = (self.num_groups, self.eps, self.silu)
            return _GroupNormSiLU.apply(input, self.weight, self.bias, *settings)
        # torch.compile fuses these, and the CPU's own kernels take half input and float32 weights
        y = super().forward(input)
        return (F.silu(y) if self.silu else y).to(input.dtype)


class GroupNormSiLU(GroupNorm):
    """`GroupNorm`, then SiLU."""

    silu = True


@torch.library.custom_op("repa_e::group_norm_silu", mutates_args=())
def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight (C,), bias (C,) => y like x, and of each group mean and 1 / deviation, (N, G)
    float32. One operation: profilers and counters of FLOPs see it as a whole."""
    kernels = _kernels(x)
    if kernels:
        with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of x
            return kernels.forward(x, weight, bias, groups, eps, silu)
    num, channels = x.shape[:2]
    sizes = (num, channels, math.prod(x.shape[2:]), groups, eps)
    y, mean, rstd = torch.native_group_norm(x.float().contiguous(), weight, bias, *sizes)
    return torch.empty_like(x).copy_(F.silu(y) if silu else y), mean, rstd


@group_norm_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool):
    mean = x.new_empty((len(x), groups), dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean)


@torch.library.custom_op("repa_e::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of y => those of x, weight and bias; the other arguments are those of
    `group_norm_silu` and what it returned."""
    kernels = _kernels(x)
    if kernels:
        dy = torch.empty_like(x).copy_(dy) if dy.stride() != x.stride() else dy
        with torch.cuda.device_of(x):
            return kernels.backward(dy, x, mean, rstd, weight, bias, groups, silu)
    num, channels = x.shape[:2]
    by_channel = (num, channels, *[1] * (x.ndim - 2))
    value, grad = x.float().contiguous(), dy.float().contiguous()
    if silu:
        centre, scale = (t.repeat_interleave(channels // groups, 1) for t in (mean, rstd))
        scale = scale * weight
        g = value * scale.view(by_channel) + (bias - centre * scale).view(by_channel)
        grad = torch.ops.aten.silu_backward(grad, g)
    sizes = (num, channels, math.prod(x.shape[2:]), groups, [True, True, True])
    dx, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
        grad, value, mean, rstd, weight, *sizes
    )
    return torch.empty_like(x).copy_(dx), d_weight, d_bias


@group_norm_silu_backward.register_fake
def _(dy, x, mean, rstd, weight, bias, groups: int, silu: bool):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


class _GroupNormSiLU(torch.autograd.Function):
    """y of `group_norm_silu`; keeps no tensor of the size of y for the backward pass but x."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups: int, eps: float, silu: bool):  # pyright: ignore
        y, mean, rstd = group_norm_silu(x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = group_norm_silu_backward(dy, *ctx.saved_tensors, ctx.groups, ctx.silu)
        return *grads, None, None, None


# --------------------------------------------------------------------------------------
# The Triton kernels, or none.


def _kernels(x: Tensor):
    """The module of the Triton kernels if they can be used for x, else None: torch's own
    operations in float32 then give the same numbers, slower."""
    if not x.is_cuda or x.dtype == torch.float64 or not _triton_works(x.device):
        return None
    from models.layers import group_norm_triton

    return group_norm_triton if group_norm_triton.fits(x) else None


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton is installed and can build kernels here: it needs a C compiler."""
    try:
        from models.layers import group_norm_triton as kernels

        x = torch.ones(1, 8, 2, 2, device=device).to(memory_format=torch.channels_last)
        ones = torch.ones(8, device=device)
        with torch.cuda.device_of(x):
            y, mean, rstd = kernels.forward(x, ones, ones, 4, 1e-6, True)
            kernels.backward(y, x, mean, rstd, ones, ones, 4, True)
    except Exception as error:  # whatever a missing or broken tool chain raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        warnings.warn(f"norms run in float32, slower, as Triton fails: {reason}", stacklevel=1)
        return False
    return True
