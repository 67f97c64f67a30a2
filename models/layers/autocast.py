"""Layers that leave autocast, and norms of half tokens.

Autocast runs convolutions and matrix products in half precision and returns every norm in float32.
At the ends of an autoencoder, half precision is wrong: images and moments would lie on its coarse
grid. For a norm, float32 is slow: it does nothing but read and write memory.

N batch, T tokens, D width; "half" is bfloat16 or float16.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

    def __reduce__(self):
        """For pickle, which cannot find a class that is made at run time."""
        return _new_outside_autocast, (type(self).__mro__[2],), self.__getstate__()


@cache
def _outside_autocast_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_OutsideAutocast, cls), {})


def _new_outside_autocast(cls: type[nn.Module]) -> nn.Module:
    made = _outside_autocast_class(cls)
    return made.__new__(made)


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


def half_weights(module: nn.Module, x: Tensor) -> AbstractContextManager:
    """Inside, the linear and convolution layers of `module` hold their weights as autocast would
    cast them, on GPUs: one kernel casts them all, and one their gradients, in place of one for each
    tensor. `x`: what the module computes with."""
    if not x.is_cuda or torch.compiler.is_compiling() or not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return temporary_weights(module, torch.get_autocast_dtype("cuda"))


@contextmanager
def temporary_weights(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the layers of `module` that autocast runs in half precision hold weights in `dtype`,
    whose gradients reach the real ones."""
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    tables = [m._parameters for m in layers if not isinstance(m, _OutsideAutocast)]
    places = [(table, name) for table in tables for name, p in table.items() if p is not None]
    weights: list[Any] = [table[name] for table, name in places]
    if all(w.dtype == dtype for w in weights):
        yield
        return
    for (table, name), half in zip(places, _CastTogether.apply(dtype, *weights)):
        table[name] = half
    try:
        yield
    finally:
        for (table, name), weight in zip(places, weights):
            table[name] = weight


class _CastTogether(torch.autograd.Function):
    """Tensors => the same in another format."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor):  # pyright: ignore
        ctx.set_materialize_grads(False)
        ctx.formats = [t.dtype for t in tensors]
        return tuple(_cast_together(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore
        found = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        formats = [ctx.formats[i] for i, _ in found]
        cast = _cast_together([grad for _, grad in found], formats)
        wide: list[Tensor | None] = [None] * len(grads)
        for (i, _), grad in zip(found, cast):
            wide[i] = grad
        return None, *wide


def _cast_together(tensors: Sequence[Tensor], formats: Sequence[torch.dtype]) -> list[Tensor]:
    made = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, formats)]
    torch._foreach_copy_(made, list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return made


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 if it is half."""
    return x.float() if x.dtype in HALF else x


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens h (N, T, D) by shift and scale (N, D): zeros change nothing.

    For half tokens, shift and scale are to be float32: near 1, numbers in bfloat16 are 0.008 apart,
    and small scales would be lost.
    """
    factor = (1 + scale)[:, None]
    return h * factor + shift[:, None] if h.dtype not in HALF else _add(shift[:, None], h, factor)


def add_gated(h: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """h + gate update of tokens h, update (N, T, D) and gate (N, D), which is float32 for half
    tokens."""
    if h.dtype not in HALF:
        return h + gate[:, None] * update
    return _add(h, update, gate[:, None])


def _add(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """base + x factor, in the half format of x: x (N, T, D), factor (N, 1, D) float32, base like
    either."""
    if torch.compiler.is_compiling():
        return (base + x.float() * factor).to(x.dtype)
    return _AddProduct.apply(base, x, factor)


class _AddProduct(torch.autograd.Function):
    """`_add` without a float32 copy of x: one kernel, rounded once."""

    @staticmethod
    def forward(ctx, base: Tensor, x: Tensor, factor: Tensor):  # pyright: ignore
        ctx.save_for_backward(x, factor)
        ctx.summed = base.shape != x.shape
        return torch.addcmul(base, x, factor, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, factor = ctx.saved_tensors
        dx = torch.mul(grad, factor, out=torch.empty_like(x))
        # products of scaled float16 gradients may leave its range; those of bfloat16 only round
        wide = grad.float() if grad.dtype == torch.float16 else grad
        d_factor = (wide * x).sum(1, keepdim=True, dtype=torch.float32)
        base = grad.sum(1, keepdim=True, dtype=torch.float32) if ctx.summed else grad
        return base, dx, d_factor
