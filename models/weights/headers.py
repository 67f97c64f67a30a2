"""The shapes in a weight file, read without its numbers; a .safetensors, written piece by piece."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.weights.reading import read_state

# The names of dtypes in the header of a .safetensors.
NAMES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file on the meta device; their numbers are not read."""
    return {name: value.to("meta") for name, value in read_state(path).items()}


def write_safetensors(
    write: Callable[[Any], object], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """The bytes of safetensors' `save_file`, one tensor after the other to `write`: it can write
    neither into an open file nor hash what it writes."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little") + text)
    for name in order:
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.numel():
            write(tensor.reshape(-1).view(torch.uint8).numpy().data)
