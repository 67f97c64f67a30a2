"""How long counted operations take on a device: predictions, which no GPU has confirmed.

A kernel takes the longest of its arithmetic, its memory traffic and its own start; a phase takes
the sum of its kernels, or, where that is longer, the time in which the host can launch them. Four
figures come of that:

eager         every operation is a kernel of its own, at the rates that are sustained
fused         a bound for compiled code: a pointwise operation, a copy or a cast runs inside the
              kernel before it, and costs the reading of what that kernel does not have, i.e. all of
              its inputs but the largest. Matrix products, convolutions, attention, norms and other
              reductions, gathers and the optimizer stay kernels of their own
ideal         eager, at the peaks of the data sheet
fused, ideal  fused, at the peaks of the data sheet

Communication between ranks is not included: at 350 GB/s the gradients of SiT-XL and VAE take about
16 ms a step, most of it hidden behind the backward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from utils.cost.devices import Device
from utils.cost.operations import Operation

# Shares of the data sheet's peaks that large kernels sustain: of matrix products (360 TFLOP/s in
# half precision on an H100) and of the memory's bandwidth. Assumed, the same for all devices.
SUSTAINED_MATH, SUSTAINED_BANDWIDTH = 0.364, 0.8
KERNEL_START = 1.5e-6  # seconds that no kernel undercuts
LAUNCH = 4e-6  # seconds of the host for one kernel


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    half: float
    float32: float
    bandwidth: float

    @classmethod
    def of(cls, device: Device, tf32: bool, ideal: bool = False) -> "Rates":
        """Of a device; `tf32`: whether float32 matrix products and convolutions may use it."""
        math, memory = (1.0, 1.0) if ideal else (SUSTAINED_MATH, SUSTAINED_BANDWIDTH)
        single = device.tf32 if tf32 else device.fp32
        return cls(math * device.half, math * single, memory * device.bandwidth)


def seconds(operations: Iterable[Operation], rates: Rates, fused: bool = False) -> float:
    """Of operations of one phase, one after the other."""
    device = host = 0.0
    for op in operations:
        moved, kernels = (fused_bytes(op), fused_kernels(op)) if fused else (op.bytes, op.kernels)
        arithmetic = op.flops / (rates.half if op.half else rates.float32)
        device += max(arithmetic, moved / rates.bandwidth, kernels * KERNEL_START)
        host += kernels * LAUNCH
    return max(device, host)


def fused_bytes(op: Operation) -> int:
    """Bytes that an operation moves inside a fused kernel."""
    return op.read - op.largest if op.kind in ("pointwise", "copy") else op.bytes


def fused_kernels(op: Operation) -> int:
    return 0 if op.kind in ("pointwise", "copy") else op.kernels
