"""What a weight file holds, told by its content: tensors and plain values. No code is run."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from models.checks.errors import UserError, short
from models.checks.file_kinds import INDEX, OLD_PYTORCH, PICKLE, SAFETENSORS, read_json, what_is
from models.weights.archives import read_old, read_zip
from models.weights.finding import Known, find_state
from models.weights.objects import Damaged
from models.weights.tensors import is_plain

REMEDY = "name another file, or copy it again"
# words of `what_is` => what to do about such a file
REMEDIES = {
    "Git LFS": "then name it again",
    "HTML": "a download that needs a login leaves such a page: download it again",
    **dict.fromkeys(("GGUF", "ONNX", "Keras", "MessagePack", "HDF5", "NumPy"),
                    "name the same network as a .safetensors or a file of PyTorch"),
}  # fmt: skip

__all__ = ["is_plain", "read_plain", "read_state", "shards_of"]


def read_plain(path: Path | str) -> Any:
    """What a weight file holds, on the CPU, whatever its name: a .safetensors; a .pt, .pth, .ckpt
    or .bin of PyTorch, also of before 1.6; a TorchScript archive, as nested dicts; an index of
    shards, as one dict. Objects of unknown classes are `Placeholder`s.

    The tensors are parts of the file, which are read once they are used: the file must stay as it
    is. Raises `UserError`, which says what the file is, for one that is absent, damaged or another.
    """
    path = Path(path)
    kind = what_is(path)
    if kind == "absent":
        raise UserError(f"{path}: no such file; correct the path, or copy the file there")
    if kind == INDEX:
        return _read_shards(path)
    try:
        if kind == SAFETENSORS:
            return load_file(path)
        if kind in (OLD_PYTORCH, PICKLE):
            return read_old(path)
        if os.path.isfile(path) and _begins_with(path, b"PK\3\4"):
            return read_zip(path)
        reason = ""
    except Damaged as error:
        reason = f", and {error}"
    except Exception as error:  # what is wrong in a damaged or hostile file may lead to any
        reason = f", but damaged ({short(error)})"
    remedy = next((words for mark, words in REMEDIES.items() if mark in kind), REMEDY)
    raise UserError(f"{path} cannot be read as weights: it is {kind}{reason}; {remedy}")


def say_once(line: str) -> None:
    """Print a line, on the first rank of a launch alone: all of them read the same files."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def read_state(
    path: Path | str, known: Known = (), prefer: Sequence[str] = (),
    tell: Callable[[str], object] = say_once, what: str = "the network",
) -> dict[str, Tensor]:  # fmt: skip
    """The state dict of one network in a weight file: `find_state` of `read_plain`. `tell` gets
    a line on where it was found, if not at the top."""
    found = find_state(read_plain(path), known, path, prefer, what)
    if known and found.where:
        out_of = "" if found.where.startswith("without") else "from "
        tell(f"{path}: weights taken {out_of}{found.where}")
    return found.state


def _begins_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def shards_of(index: Path) -> dict[Path, list[str]]:
    """Each file that an index (`weight_map`: tensor => file beside the index) names, in the order
    of their names => its tensors. A `UserError` for a name that is not of a shard beside it."""
    remedy = "copy or download its folder again"
    content = read_json(index, remedy)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} is a damaged index of shards; {remedy}")
    found = {}
    for name in sorted(set(names.values())):
        file = index.parent / name
        if file.name != name or name == ".." or what_is(file) in (INDEX, "absent"):
            raise UserError(f"{index} names {name[:100]!r}, which is no shard beside it; {remedy}")
        found[file] = [tensor for tensor, place in names.items() if place == name]
    return found


def _read_shards(path: Path) -> dict[str, Tensor]:
    state = {}
    for file, wanted in shards_of(path).items():
        held = read_plain(file)
        absent = [n for n in wanted if not isinstance(held, dict) or n not in held]
        if absent:
            raise UserError(
                f"{file} lacks {absent[0][:100]}, which {path.name} names; copy or download its "
                "folder again"
            )
        state |= {name: held[name] for name in wanted}
    return state
