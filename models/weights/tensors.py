"""Tensors of PyTorch's files, built of their bytes in a file; `torch._utils` has the names."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from models.weights.objects import OBJECTS, Damaged, Placeholder, first

DTYPES = {f"torch.{name}": v for name, v in vars(torch).items() if isinstance(v, torch.dtype)}
STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64, "Untyped": torch.uint8,
}  # fmt: skip
MOST_DIMENSIONS, LARGEST = 64, 2**48


class NoNumbers(Placeholder):
    """A tensor whose numbers are not in the file one by one: sparse, quantized, on no device, or
    with more elements than are stored."""

    __slots__ = ()


@dataclass
class Stored:
    """Numbers of one storage of a file."""

    numbers: UntypedStorage
    dtype: torch.dtype


@dataclass(frozen=True)
class StorageId:
    """What a tensor of a file refers to: `numel` numbers of `dtype` of the storage `key`, from its
    number `start` on."""

    key: str
    dtype: torch.dtype
    numel: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def storage_id(value: Any) -> StorageId | Placeholder:
    """A persistent id of a pickle of PyTorch, ("storage", class, key, device, numel) and in old
    files (key of a view, first number, numel); of a class with its source text, the class."""
    kind = value[1] if isinstance(value, tuple) and len(value) in (4, 5, 6) else None
    if not isinstance(kind, Placeholder) or (value[0], len(value)) == ("storage", 4):
        raise Damaged("its pickle has a persistent id that is none of PyTorch's")
    if value[0] == "module":
        return kind
    key, numel, start = value[2], value[4], 0
    if len(value) == 6 and isinstance(value[5], tuple) and len(value[5]) == 3:
        start, numel = value[5][1:]
    name = kind.name.rpartition(".")[2].removesuffix("Storage")
    if name not in STORAGES:
        return NoNumbers(kind.name)  # quantized
    if value[0] != "storage" or type(key) is not str or not _are_sizes((numel, start)):
        raise Damaged("its pickle has a persistent id that is none of PyTorch's")
    return StorageId(key, STORAGES[name], numel, start)


def _are_sizes(numbers: tuple) -> bool:
    return all(type(number) is int and 0 <= number < LARGEST for number in numbers)


def rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor | NoNumbers:
    """A tensor of numbers that are in the file.

    `NoNumbers` where they are not, e.g. of a number that is repeated: a few bytes could describe
    a tensor of any size, which would fill the memory once copied.
    """
    if isinstance(storage, Placeholder):
        return NoNumbers(storage.name)
    if not (isinstance(size, tuple | list) and isinstance(stride, tuple | list)):
        raise Damaged("it has a tensor without a shape")
    shaped = len(size) == len(stride) <= MOST_DIMENSIONS and _are_sizes((offset, *size, *stride))
    if not isinstance(storage, Stored) or not shaped:
        raise Damaged("it has a tensor without a shape or a storage")
    if 0 in size:
        return torch.empty(size, dtype=storage.dtype)
    held = storage.numbers.nbytes() // storage.dtype.itemsize
    if offset + sum((side - 1) * step for side, step in zip(size, stride)) >= held:
        raise Damaged("it has a tensor that reaches beyond its storage")
    if math.prod(size) > held:
        return NoNumbers("a tensor of repeated numbers")
    return torch.empty(0, dtype=storage.dtype).set_(storage.numbers, offset, size, stride)


def rebuild_v2(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, marks: Any = None
) -> Tensor | NoNumbers:
    """`rebuild`; marks: says that complex numbers are yet to be conjugated, which is not done."""
    return NoNumbers("a conjugated tensor") if marks else rebuild(storage, offset, size, stride)


def rebuild_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
    marks: Any = None,
) -> Tensor | NoNumbers:  # fmt: skip
    """`rebuild_v2` of a storage of bytes."""
    kind = DTYPES.get(dtype.name) if isinstance(dtype, Placeholder) else None
    if kind is None or not isinstance(storage, Stored):
        return NoNumbers("a tensor of an unknown type")
    return rebuild_v2(Stored(storage.numbers, kind), offset, size, stride, grad, hooks, marks)


def _no_numbers(name: str) -> Callable[..., NoNumbers]:
    return lambda *_: NoNumbers(name)


NOT_DENSE = ("sparse_tensor", "sparse_csr_tensor", "qtensor", "meta_tensor_no_storage",
             "nested_tensor", "wrapper_subclass", "device_tensor_from_numpy",
             "xla_tensor")  # fmt: skip
# name of a class or function in a pickle of PyTorch => what makes its object of its arguments
BUILD: dict[str, Callable] = OBJECTS | {
    "torch._utils._rebuild_tensor": rebuild,
    "torch._utils._rebuild_tensor_v2": rebuild_v2,
    "torch._utils._rebuild_tensor_v3": rebuild_v3,
    "torch._utils._rebuild_parameter": first,
    "torch._utils._rebuild_parameter_with_state": first,
    **{f"torch._utils._rebuild_{name}": _no_numbers(name) for name in NOT_DENSE},
}


def is_plain(value: object) -> bool:
    """Whether this is a tensor with a stored number for each element: not sparse, not quantized,
    not on the meta device. See `rebuild`."""
    if not isinstance(value, Tensor):
        return False
    dense = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return dense and value.untyped_storage().nbytes() >= value.nbytes
