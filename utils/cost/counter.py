"""Counts what is called inside: every operation with its cost and phase, and the memory alive."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils.cost.operations import Operation, describe
from utils.cost.waits import answer, waits

OUTSIDE = "other"  # what belongs to no phase


@dataclass(slots=True)
class Counted:
    """An operation, the phase that it belongs to, and the bytes alive after it."""

    phase: str
    op: Operation
    alive: int


class Counter(TorchDispatchMode):
    """`counted` has every operation on a device. `alive` bytes are those of the tensors made inside
    that are still there: a storage counts once, however many views and saved tensors share it;
    those of `old`, which were there before, do not count.

    An observer of phases (utils/training/phases.py).
    """

    def __init__(self, old: Iterable[Tensor] = ()):
        super().__init__()
        self.counted: list[Counted] = []
        self.alive = 0
        self._phases = [OUTSIDE]
        self._storages: dict[int, Any] = {}
        self._old = {t.untyped_storage()._cdata for t in old}

    def begin(self, name: str) -> None:
        self._phases.append(name)

    def end(self, name: str) -> None:
        assert self._phases.pop() == name

    @property
    def curve(self) -> list[int]:
        """Bytes alive after each operation."""
        return [each.alive for each in self.counted]

    def keep(self, storage: torch.UntypedStorage) -> None:
        """Do not count a storage from now on: it is there between two steps."""
        key = storage._cdata
        self._old.add(key)
        if key in self._storages:
            self._drop(key, storage.nbytes())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # asked at every operation
            return args[0].fake_device if hasattr(args[0], "fake_device") else func(*args)
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        inputs = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        host_waits = waits(func, args, kwargs, inputs)
        out = answer(func, args, kwargs) if host_waits else func(*args, **kwargs)
        outputs = [v for v in tree_leaves(out) if isinstance(v, Tensor)]
        for value in outputs:
            self._add(value.untyped_storage())
        op = describe(func, args, kwargs, out, inputs, outputs)
        op.waits = host_waits
        self.counted.append(Counted(self._phases[-1], op, self.alive))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages and key not in self._old:
            self.alive += size
            self._storages[key] = weakref.ref(storage, lambda _: self._drop(key, size))

    def _drop(self, key: int, size: int) -> None:
        if self._storages.pop(key, None) is not None:
            self.alive -= size
