"""What one operation costs a GPU: FLOPs, bytes, kernels, waits of the host. From shapes alone.

Bytes are the least that eager kernels move: every tensor of an operation is read or written once,
but a norm reads its inputs twice (once for the statistics, once to apply them), and a cuDNN
convolution on NCHW memory copies what it works on to NHWC and back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

HALF = (torch.float16, torch.bfloat16)
# They make tensors without writing to them.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# In place, without reading what was there.
OVERWRITES = ("copy_", "zero_", "fill_", "normal_", "uniform_")
NORMS = ("group_norm", "layer_norm", "batch_norm", "rms_norm")
# Operations that are no pointwise ones: words in their names.
KINDS = {
    "matrix": ("convolution", "attention"),
    "optimizer": ("_fused_", "_foreach_", "_amp_"),
    "reduction": (*NORMS, "sum", "mean", "softmax", "var", "amax", "linalg", "cumsum", "sort"),
    "gather": ("upsample", "pool", "embedding", "index", "gather", "scatter"),
}
# Launches of operations of this repository that are several kernels.
OWN_KERNELS = {"group_norm_silu": 3, "group_norm_silu_backward": 5}
# Of one launch of a multi-tensor kernel, by the number of tensor lists it works on: most tensors.
TENSORS_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNK, CHUNKS_A_LAUNCH = 65_536, 320


@dataclass(slots=True)
class Operation:
    """One operation. `kind`: matrix, pointwise, reduction, gather, copy or optimizer, or none for
    a view or an allocation. `largest`: bytes of its largest input. `copies` and `casts`: those of
    its bytes that only change the memory format, or only the type."""

    name: str
    kind: str = "none"
    flops: int = 0
    half: bool = False  # whether the FLOPs are done in half precision
    read: int = 0
    written: int = 0
    largest: int = 0
    kernels: int = 0
    copies: int = 0
    casts: int = 0
    waits: bool = False  # whether the host waits for the device

    @property
    def bytes(self) -> int:
        return self.read + self.written


def describe(
    func: Any, args: tuple, kwargs: dict, out: Any, inputs: list[Tensor], outputs: list[Tensor]
) -> Operation:
    """The cost of `out = func(*args, **kwargs)`, whose tensors are `inputs` and `outputs`."""
    schema = func._schema
    op = Operation(schema.name.partition("::")[2])
    if op.name in ALLOCATIONS:
        return op
    if not schema.is_mutable and _storages(outputs) <= _storages(inputs):
        return op  # a view, or nothing to do
    op.kind, op.kernels = _kind(op.name), OWN_KERNELS.get(op.name, 1)
    changed = _changed(schema, args, kwargs) if schema.is_mutable else _unique(outputs)
    sizes = [_size([t]) for t in _unique(inputs)]
    op.read, op.written, op.largest = sum(sizes), _size(changed), max(sizes, default=0)
    if op.name in OVERWRITES:
        op.read -= op.written
    elif any(norm in op.name for norm in NORMS):
        passes = inputs[:2] if op.name.endswith("backward") else inputs[:1]
        op.read += _size(passes)
    if op.kind == "optimizer":
        _describe_lists(op, args)
    elif op.name in ("_to_copy", "copy_", "clone"):
        _describe_copy(op, *((inputs[0], outputs[0]) if op.name != "copy_" else inputs[1::-1]))
    if formula := flop_registry.get(func._overloadpacket):
        op.flops = formula(*args, **kwargs, out_val=out)
        op.half = any(t.dtype in HALF for t in inputs)
    if "convolution" in op.name:
        _describe_convolution(op, args, inputs, outputs)
    return op


def _kind(name: str) -> str:
    if name.rstrip("_").endswith(("mm", "dot", "mv")):
        return "matrix"
    found = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return next(found, "pointwise")


def _size(tensors: Sequence[Tensor]) -> int:
    """Bytes; values that are repeated by a stride of 0 count once."""
    return sum(_values(t) * t.element_size() for t in tensors)


def _values(t: Tensor) -> int:
    if 0 not in t.stride():
        return t.numel()
    return math.prod(n for n, stride in zip(t.shape, t.stride()) if stride)


def _unique(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values()) if len(tensors) > 1 else list(tensors)


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def _changed(schema: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operation changes in place. AdamW's schema names the gradients too,
    which it changes under a loss scale alone."""
    found: list[Any] = []
    for number, argument in enumerate(schema.arguments):
        if argument.is_write and argument.name != "grads":
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, list | tuple) else [value]
    return _unique([t for t in found if isinstance(t, Tensor)])


def _describe_lists(op: Operation, args: tuple) -> None:
    """Kernels on lists of tensors take many of them in one launch."""
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    if not lists:
        return
    tensors = lists[0]
    chunks = sum(-(-t.numel() // CHUNK) for t in tensors)
    most = TENSORS_A_LAUNCH[min(len(lists), 5)]
    op.kernels = max(-(-chunks // CHUNKS_A_LAUNCH), -(-len(tensors) // most))


def _describe_copy(op: Operation, source: Tensor, target: Tensor) -> None:
    if source.dtype != target.dtype:
        op.casts = op.bytes
    else:
        op.kind = "copy"
    if source.ndim == 4 and source.shape == target.shape and _order(source) != _order(target):
        op.copies = op.bytes


def _order(t: Tensor) -> list[int]:
    """The dimensions from the slowest to the fastest in memory, without those of size 1."""
    return sorted((d for d in range(t.ndim) if t.shape[d] > 1), key=lambda d: -t.stride(d))


def _describe_convolution(
    op: Operation, args: tuple, inputs: list[Tensor], outputs: list[Tensor]
) -> None:
    """Backward is one kernel for each gradient. Images and their gradients that do not lie in
    memory as NHWC are copied so before, and back after."""
    backward = op.name == "convolution_backward"
    images = inputs[: 1 + backward]
    if backward:
        op.kernels = sum(args[10])
        images += outputs[: int(args[10][0])]
    else:
        images += outputs
    copied = [t for t in images if not _is_nhwc(t)]
    op.copies = 2 * _size(copied)
    op.read, op.written = op.read + op.copies // 2, op.written + op.copies // 2
    op.kernels += len(copied)


def _is_nhwc(t: Tensor) -> bool:
    """Also a tensor of a single channel or pixel, which lies both ways."""
    return t.ndim != 4 or t.is_contiguous(memory_format=torch.channels_last)
