"""Number formats: autocast by name (bf16, fp16, fp32), what a CPU lacks, and TF32 on or off."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import torch
import torch.nn as nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Instructions that multiply in a format, by the names of torch.cpu.get_capabilities() and of Linux.
NATIVE = {
    "bf16": {"avx512_bf16", "amx_bf16", "bf16", "sve_bf16", "svebf16"},
    "fp16": {"avx512_fp16", "amx_fp16", "fp16_arith", "asimdhp"},
}


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Mixed precision for forwards; `precision` is a key of `DTYPES`, "fp32" switches it off."""
    dtype = DTYPES[precision]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def cast_weights(net: nn.Module, precision: str) -> None:
    """Keep the weights of a frozen network's matrix products and convolutions in the format that
    autocast would cast them to at every call, in place; norms and all else stay as they are."""
    if DTYPES[precision] == torch.float32:
        return
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(DTYPES[precision])


def to_channels_last(net: nn.Module) -> None:
    """Keep the weights of 2-D convolutions in NHWC memory, in which GPUs compute them. Layer by
    layer: Qwen's VAE has 3-D convolutions too, which a blanket conversion refuses."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def effective_precision(precision: str, device: torch.device | str) -> str:
    """The precision to compute in where `precision` is asked for: "fp32" on a CPU that has no
    instructions for the other one, which took 10 (bf16) and 11 (fp16) times as long as float32."""
    emulated = torch.device(device).type == "cpu" and not cpu_has(precision)
    return "fp32" if emulated else precision


def emulation_note(precision: str, device: torch.device | str) -> str | None:
    """One line for the user where `effective_precision` is another; None where it is not."""
    used = effective_precision(precision, device)
    return None if used == precision else f"{used} is used: this CPU has no native {precision}"


@cache
def cpu_has(precision: str) -> bool:
    """Whether this CPU multiplies in `precision`, a key of `DTYPES`. Tests of the other formats
    replace this by one that says yes."""
    return precision == "fp32" or bool(NATIVE[precision] & _cpu_features())


def _cpu_features() -> set[str]:
    """What this CPU can do, as torch and Linux name it: neither is there everywhere."""
    ask = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.11 may lack it
    found = {name for name, there in ask().items() if there is True}
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    for line in lines:
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return found | set(words.split())
    return found


def allow_tf32(allowed: bool) -> None:
    """TF32 in float32 matrix products and convolutions, on GPUs that have it.

    Only the older of torch's two APIs sets it: readers of the newer one (`fp32_precision`) see that
    as well. After the newer one, readers of the older raise an error: parts of torch.compile are.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def exact_float32() -> AbstractContextManager[None]:
    """No TF32 inside: PyTorch lets cuDNN use it by default, and training may for matmuls too."""
    return tf32_inside(False)


@contextmanager
def tf32_inside(allowed: bool) -> Iterator[None]:
    """`allow_tf32` for a while."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions
