"""Where the host waits for the device: a value is read back, a shape depends on values, or memory
is copied between host and device not asynchronously."""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
SHAPES = ("nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


def waits(func: Any, args: tuple, kwargs: dict, inputs: list[Tensor]) -> bool:
    """Whether `func`, on these `inputs`, makes the host wait for a CUDA device."""
    if not inputs:
        return False
    name = func._schema.name.partition("::")[2]
    if name in ("_to_copy", "copy_"):
        return _waits_for_copy(args, kwargs)
    if not any(t.device.type == "cuda" for t in inputs):
        return False
    if name in ("_local_scalar_dense", "equal") or name in SHAPES:
        return True
    if name in INDEXING and any(_is_mask(index) for index in args[1]):
        # a number put where one mask is true needs no indices
        return name == "index" or len(args[1]) > 1 or args[2].numel() > 1
    return False


def _waits_for_copy(args: tuple, kwargs: dict) -> bool:
    tensors = [a for a in args if isinstance(a, Tensor)]
    target = torch.device(kwargs.get("device") or tensors[0].device)
    devices = {target.type, *(t.device.type for t in tensors)}
    asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
    return devices == {"cpu", "cuda"} and not asynchronous


def answer(func: Any, args: tuple, kwargs: dict) -> Any:
    """The result of an operation that `waits`. Where it depends on values, these are made up: a
    number is 0, tensors are equal, every value of a mask is true."""
    name = func._schema.name.partition("::")[2]
    if name == "_local_scalar_dense":
        return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
    if name == "equal":
        return True
    if name == "nonzero":
        return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.long)
    if name == "masked_select":
        return args[0].new_empty(args[0].numel())
    if name in INDEXING:
        return func(args[0], _without_masks(args[1]), *args[2:], **kwargs)
    return func(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _without_masks(indices: list) -> list:
    """A mask over k dimensions in the place of k indices becomes these, of all its places."""
    found: list = []
    for index in indices:
        places = index.new_zeros(index.numel(), dtype=torch.long) if _is_mask(index) else index
        found += [places] * (index.ndim if _is_mask(index) else 1)
    return found
