"""What a weight file holds, told by its content: tensors and plain values. No code is run."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.checks.errors import UserError, short
from models.checks.file_kinds import PICKLES, SAFETENSORS, what_is
from models.weights.loading import first_names


def read_plain(path: Path) -> Any:
    """What a file holds of tensors and plain values, on the CPU: a .safetensors, or a .pt / .pth /
    .ckpt of PyTorch, told apart by their content. Runs no pickled code.

    Raises `UserError`, which says what the file is, for one that is absent, damaged or another.
    """
    kind = what_is(path)
    try:
        if kind == SAFETENSORS:
            return load_file(path)
        if os.path.isfile(path):
            with path.open("rb") as file:  # given a path, torch goes by the end of its name
                return torch.load(file, map_location="cpu", weights_only=True)
        reason = ""
    except Exception as error:  # a damaged or hostile file makes the unpickler raise anything
        reason = f" ({short(error)})"
    if kind == "absent":
        raise UserError(f"{path}: no such file; correct the path, or copy the file there")
    remedy = "name another file, or copy it again"
    if kind in PICKLES:
        remedy = "for a training checkpoint of the official code run scripts/import_official.py"
    raise UserError(
        f"{path} is not a file of plain tensors, and nothing else is ever unpickled: it is "
        f"{kind}{reason}; {remedy}"
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a weight file, see `read_plain`. The tensors may stand bare in the file, or
    under "state_dict" or "model"; `UserError` for anything else."""
    content = read_plain(path)
    content = content if isinstance(content, dict) else {}
    state = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not isinstance(state, dict) or not state or not all(map(is_plain, state.values())):
        raise UserError(
            f'{path} is neither a state dict nor a dict with one under "state_dict": it holds '
            f"{first_names([*map(str, content)], 8) or 'no named tensors'}"
        )
    return {str(name): value for name, value in state.items()}


def is_plain(value: object) -> bool:
    """Whether this is a tensor with a stored number for each element: not sparse, not quantized,
    not on the meta device. A few bytes can describe a tensor of any size, which would fill the
    memory once copied."""
    if not isinstance(value, Tensor):
        return False
    dense = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return dense and value.untyped_storage().nbytes() >= value.nbytes
