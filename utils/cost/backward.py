"""The backward pass of fake CUDA tensors, in Python.

torch's engine asks for the streams of the GPU that a tensor is on, which fails where there is none.
This one walks the same graph in the same order (the newest operation first, leaves at once), calls
the same derivatives, and frees what they have used.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Backward:
    """Context manager: inside, `Tensor.backward` and `torch.autograd.grad` run here.

    `arrived` is told the storage of each gradient when it becomes that of a parameter.
    """

    def __init__(self):
        self.arrived: Callable[[torch.UntypedStorage], None] = lambda storage: None
        self._used: list[_Saved] = []
        self._number = 0
        self._wanted: tuple[list, dict] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Backward":
        self._stack.enter_context(saved_tensors_hooks(_Saved, self._unpack))
        for name in ("backward", "grad"):
            self._stack.enter_context(patch.object(torch.autograd, name, getattr(self, name)))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _unpack(self, saved: "_Saved") -> Tensor:
        assert saved.tensor is not None, "a second backward through the same graph"
        self._used.append(saved)
        return saved.tensor

    def backward(
        self,
        tensors: Tensor | Sequence[Tensor],
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
        **_: Any,
    ) -> None:
        """As `torch.autograd.backward`, through a graph that is used once."""
        assert not (create_graph or retain_graph or inputs), "not needed by any training step"
        self._run(_listed(tensors), _listed(grad_tensors), None)

    def grad(
        self,
        outputs: Tensor | Sequence[Tensor],
        inputs: Tensor | Sequence[Tensor],
        grad_outputs: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        **_: Any,
    ) -> tuple[Tensor | None, ...]:
        """As `torch.autograd.grad`, of leaves, through a graph that is used once."""
        assert not (create_graph or retain_graph), "not needed by any training step"
        leaves = _listed(inputs)
        assert all(leaf.is_leaf for leaf in leaves), "gradients of leaves alone"
        found: dict[Tensor, Tensor] = {}
        self._run(_listed(outputs), _listed(grad_outputs), (leaves, found))
        return tuple(found.get(leaf) for leaf in leaves)

    def _run(self, roots: list, given: list, wanted: tuple[list, dict] | None) -> None:
        self._number += 1  # checkpointing computes a block again once for each backward
        number, outer = self._number, (self._used, self._wanted)
        self._used, self._wanted = [], wanted
        given += [None] * (len(roots) - len(given))
        with torch.no_grad(), patch.object(torch._C, "_current_graph_task_id", lambda: number):
            self._walk([(r, torch.ones_like(r) if g is None else g) for r, g in zip(roots, given)])
        self._used, self._wanted = outer

    def _walk(self, roots: list[tuple[Tensor, Tensor]]) -> None:
        waits = _count_incoming([r.grad_fn for r, _ in roots])
        grads: dict[Any, list[Tensor | None]] = {}
        ready: list[tuple[int, int, Any]] = []
        for root, grad in roots:
            _add(grads, root.grad_fn, root.output_nr, grad)
        for node in _unique(r.grad_fn for r, _ in roots):
            if not waits[node]:
                heapq.heappush(ready, (-node._sequence_nr(), id(node), node))
        del roots
        while ready:
            node = heapq.heappop(ready)[2]
            outputs = self._call(node, grads.pop(node, None))
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            for (following, number), grad in zip(edges, outputs, strict=True):
                if grad is not None:
                    grad = _fitting(grad, following._input_metadata[number])
                    _add(grads, following, number, grad)
                waits[following] -= 1
                if waits[following] == 0:
                    heapq.heappush(ready, (-following._sequence_nr(), id(following), following))

    def _call(self, node: Any, grads: list[Tensor | None] | None) -> list[Tensor | None]:
        """The gradients of those inputs of a node that have an edge, from those of its outputs."""
        has_edge = [edge[0] is not None for edge in node.next_functions]
        if grads is None:  # nothing has arrived
            return [None] * sum(has_edge)
        if hasattr(node, "variable"):
            self._accumulate(node.variable, grads[0])
            return []
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            pairs = zip(grads, getattr(node, "_input_metadata"))  # noqa: B009
            grads = [_zeros(like) if g is None else g for g, like in pairs]
            found = node.apply(*grads)
            has_edge = node.needs_input_grad  # of all arguments, also of those that are no tensors
        else:
            found = node(*grads)
        for saved in self._used:
            saved.tensor = None
        self._used.clear()
        found = found if isinstance(found, tuple | list) else (found,)
        return [grad for grad, has in zip(found, has_edge) if has]

    def _accumulate(self, leaf: Tensor, grad: Tensor | None) -> None:
        if grad is None:
            return
        if self._wanted:
            leaves, found = self._wanted
            if any(leaf is wanted for wanted in leaves):
                found[leaf] = grad
        elif leaf.grad is not None:
            leaf.grad.add_(grad)
        else:
            same = grad.stride() == leaf.stride() or not leaf.is_contiguous()
            leaf.grad = grad.detach() if same else torch.empty_like(leaf).copy_(grad)
            self.arrived(leaf.grad.untyped_storage())


def _unique(nodes: Iterable[Any]) -> dict[Any, None]:
    return dict.fromkeys(nodes)


def _listed(value: Any) -> list:
    return [value] if isinstance(value, Tensor) else list(value or ())


class _Saved:
    """A tensor that a node keeps for its backward."""

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor


def _count_incoming(roots: Sequence[Any]) -> dict[Any, int]:
    """How many gradients each node of the graph below `roots` waits for."""
    waits = dict.fromkeys(roots, 0)
    stack = list(waits)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                if following not in waits:
                    waits[following] = 0
                    stack.append(following)
                waits[following] += 1
    return waits


def _add(grads: dict, node: Any, number: int, grad: Tensor) -> None:
    """Add the gradient of output `number` of a node to what has arrived of it."""
    own = grads.setdefault(node, [None] * len(node._input_metadata))
    before = own[number]
    own[number] = grad if before is None else before + grad


def _fitting(grad: Tensor, like: Any) -> Tensor:
    """In the shape and type of the tensor that it is the gradient of."""
    if grad.shape != like.shape:
        grad = grad.sum_to_size(like.shape)
    return grad.to(like.dtype) if grad.dtype != like.dtype else grad


def _zeros(like: Any) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
