"""The config.json beside the weights of a network, and the arguments it gives to its class."""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from models.checks.errors import UserError
from models.checks.file_kinds import read_json
from models.checks.values import Range, RecordError, convert

# what `save_pretrained` of diffusers writes into a folder
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# no number of a network's config is outside; numbers of layers are smaller
SIZES = Range(at_least=0, at_most=2**20)
LONGEST = 32  # list in such a config, but for statistics of channels
LAYERS = ("depth", "layers_per_block", "num_res_blocks")


def read_config(path: Path) -> dict:
    """The config.json that lies beside a network's weights; `UserError` if it cannot be read."""
    remedy = "copy or download its folder again"
    try:
        config = read_json(path, remedy)
    except UserError as error:
        raise UserError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, expected an object; {remedy}")
    return config


def arguments_for(network: type, config: Mapping, origin) -> dict[str, Any]:
    """The entries of a config.json that the class `network` takes, each as its `__init__` declares
    it, every number in `SIZES`; `UserError` naming `origin` for one that is not."""
    hints = get_type_hints(network.__init__)
    taken = {name: value for name, value in config.items() if name in hints and name != "return"}
    taken = {n: list(v) if isinstance(v, tuple) else v for n, v in taken.items()}
    try:
        found = {name: _argument(name, value, hints[name]) for name, value in taken.items()}
    except RecordError as error:
        raise UserError(f"config of {origin}: {error}") from None
    declared = signature(network.__init__).parameters
    # diffusers 0.35 declares tuples where it adds to a list, as its defaults are
    wants_list = {name for name in found if isinstance(declared[name].default, list)}
    wants_list -= {name for name, value in found.items() if value is None}
    return {name: list(v) if name in wants_list else v for name, v in found.items()}


def _argument(name: str, value: Any, kind: Any) -> Any:
    if value is None and name.startswith(("latents_", "scaling_", "shift_")):
        return None  # none, also where the class has one of its own
    if isinstance(value, list) and len(value) > LONGEST and not name.startswith("latents_"):
        raise RecordError(f"{name} is a list of {len(value)}, expected at most {LONGEST}")
    allowed = Range(at_least=1, at_most=256) if name in LAYERS else SIZES
    # statistics and the shift of latents are the only numbers that may be negative
    signed = name.startswith(("latents_", "shift_"))
    return convert(value, kind, name, Range() if signed else allowed)
