"""The device of a benchmark: its name, its peak memory, its matrix products; counted FLOPs."""

import resource
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from utils.distributed import Ranks
from utils.precision import DTYPES, allow_tf32
from utils.provenance import device_name, versions

GIB = 2**30
# side of the square matrices whose product is timed, and how often: some 20 ms each on an H100 in
# TF32, 50 ms on two CPU cores in float32
SIDE = {"cuda": 8192, "cpu": 1024}
PRODUCTS = 10


def describe_device(device: torch.device) -> dict[str, Any]:
    """{"device": its name, "versions": of what drives it and of this code}."""
    facts = {"device": device_name(device), "versions": dict(versions())}
    if device.type == "cuda":
        facts["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total(ranks: Ranks, value: float) -> float:
    """The sum of a number of each rank, on every rank."""
    return ranks.sum(torch.tensor([value], device=ranks.device)).item()


# --------------------------------------------------------------------------------------
# Memory.


def forget_peak(device: torch.device) -> None:
    """`peak_memory` counts from here, on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """In GiB: on a GPU what tensors held at most, and what the allocator had taken for them; on the
    CPU what this process held at most since it began."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device) / GIB
        reserved = torch.cuda.max_memory_reserved(device) / GIB
        return {"peak_memory_gib": held, "peak_memory_reserved_gib": reserved}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}


# --------------------------------------------------------------------------------------
# Arithmetic.


def matmul_peak(device: torch.device, precisions: set[str], tf32: bool) -> dict[str, float]:
    """{format: TFLOP/s} of the fastest product of large square matrices: of each of `precisions`
    (keys of `DTYPES`), and on a GPU of tf32. Leaves TF32 allowed if `tf32` says so."""
    formats = {name: (DTYPES[name], False) for name in sorted(precisions)}
    if device.type == "cuda":
        formats["tf32"] = (torch.float32, True)
    found = {name: _time_products(device, *kind) for name, kind in formats.items()}
    allow_tf32(tf32)
    return found


def _time_products(device: torch.device, dtype: torch.dtype, tf32: bool) -> float:
    allow_tf32(tf32)
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) / 1e12


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs (two for a multiplication with its addition) of the matrix products, convolutions and
    attentions of a call, which runs as it is, but without compiled code."""
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
        call()
    return counter.total


class FlopCounter(TorchDispatchMode):
    """Sums the FLOPs of what is called inside, by torch's formulas. torch's own counter follows the
    modules as well, by hooks that forbid a gradient to be taken inside a forward pass."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = formulas().get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


@cache
def formulas() -> dict[Any, Callable[..., int]]:
    """torch's formulas by operation, and those of attention on the CPU, which it lacks."""
    forward = "_scaled_dot_product_flash_attention_for_cpu"
    return flop_registry | {
        getattr(torch.ops.aten, forward): _attention,
        getattr(torch.ops.aten, f"{forward}_backward"): _attention_backward,
    }


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
