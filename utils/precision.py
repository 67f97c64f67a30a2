"""Number formats: autocast by name (bf16, fp16, fp32), and TF32 on or off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Mixed precision for forwards; `precision` is a key of `DTYPES`, "fp32" switches it off."""
    dtype = DTYPES[precision]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def allow_tf32(allowed: bool) -> None:
    """TF32 in float32 matrix products and convolutions, on GPUs that have it."""
    for backend in _backends():
        backend.fp32_precision = "tf32" if allowed else "ieee"


def _backends() -> tuple[Any, Any]:
    """The settings of matrix products and convolutions; torch's type stubs lack the second."""
    return torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv")  # noqa: B009


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 inside: PyTorch lets cuDNN use it by default, and training may for matmuls too."""
    backends = _backends()
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
