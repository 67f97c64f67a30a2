"""Layers that leave autocast, and norms of half tokens.

Autocast runs convolutions and matrix products in half precision and returns every norm in float32.
At the ends of an autoencoder, half precision is wrong: images and moments would lie on its coarse
grid. For a norm, float32 is slow: it does nothing but read and write memory.

N batch, T tokens, D width; "half" is bfloat16 or float16.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast is off inside, for the device of x. The meta device has none."""
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class _OutsideAutocast(nn.Module):
    """Mixed into the class of a layer: it computes in the number format of its weights."""

    weight: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with no_autocast(x):
            return super().forward(x.to(self.weight.dtype), *args, **kwargs)


@cache
def _outside_autocast_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_OutsideAutocast, cls), {})


def leave_autocast(layer: nn.Module | None) -> None:
    """Let a layer compute in the format of its weights from now on; None = no layer. Its class is
    exchanged for a subclass: parameters and their names stay as they are."""
    if layer is not None and not isinstance(layer, _OutsideAutocast):
        layer.__class__ = _outside_autocast_class(type(layer))


class LayerNorm(nn.LayerNorm):
    """Layer norm whose output has the format of its input also under autocast; torch's kernels keep
    its statistics in float32."""

    def forward(self, input: Tensor) -> Tensor:
        with no_autocast(input):
            return super().forward(input)


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens h (N, T, D) by shift and scale (N, D): zeros change nothing.

    For half tokens, 1 + scale is computed in float32: near 1, numbers in bfloat16 are 0.008 apart,
    and small scales would be lost.
    """
    if h.dtype not in HALF:
        return h * (1 + scale[:, None]) + shift[:, None]
    if torch.compiler.is_compiling():
        return (h.float() * (1 + scale.float()[:, None]) + shift.float()[:, None]).to(h.dtype)
    return _Modulate.apply(h, shift, scale)


def add_gated(h: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """h + gate update of tokens h, update (N, T, D) and gate (N, D); half numbers are rounded once,
    not twice."""
    if h.dtype in HALF:
        return torch.addcmul(h, gate[:, None], update)
    return h + gate[:, None] * update


class _Modulate(torch.autograd.Function):
    """`modulate` of half tokens, without a float32 copy of them."""

    @staticmethod
    def forward(ctx, h, shift, scale):  # pyright: ignore[reportIncompatibleMethodOverride]
        factor = (1 + scale.float())[:, None]
        ctx.save_for_backward(h, factor)
        ctx.formats = shift.dtype, scale.dtype
        return torch.addcmul(shift.float()[:, None], h, factor, out=torch.empty_like(h))

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        h, factor = ctx.saved_tensors
        dh = torch.mul(grad, factor, out=torch.empty_like(h))
        d_shift = grad.sum(1, dtype=torch.float32).to(ctx.formats[0])
        d_scale = (grad * h).sum(1, dtype=torch.float32).to(ctx.formats[1])
        return dh, d_shift, d_scale
