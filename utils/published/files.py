"""What a published file holds: a training checkpoint, a SiT, a VAE, or statistics of latents.

Nothing is executed from a pickle: `torch.load(weights_only=True)` builds tensors and plain
containers only. The one class allowed beside them is `argparse.Namespace`, in which the training
checkpoints of REPA-E, REPA and SiT keep their settings.
"""

import argparse
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.checks.errors import UserError
from models.checks.file_kinds import SAFETENSORS, what_is
from models.checks.values import Range
from models.weights.reading import is_plain

State = dict[str, Tensor]

# what DistributedDataParallel and torch.compile put before the names of parameters
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
LONGEST = 4096  # characters of a setting
NETWORKS = ("model", "ema", "vae", "discriminator")


@dataclass
class PublishedFile:
    """One published file; None stands for a network that it does not hold."""

    path: Path
    model: State | None = None
    ema: State | None = None
    vae: State | None = None
    discriminator: State | None = None
    args: dict = field(default_factory=dict)  # settings of the training run, plain values alone
    step: int = 0

    @property
    def sit(self) -> State | None:
        """The SiT that is sampled with: the EMA, or the raw weights where there is none."""
        return self.ema or self.model


def read_published(path: Path) -> PublishedFile:
    """Read a training checkpoint, or a SiT or VAE, bare or under "state_dict"; else `UserError`."""
    content = load_plain(path)
    bare = content.get("state_dict", content)
    if is_state(bare):
        state = state_dict(bare, path)
        if "encoder.conv_in.weight" in state:
            return PublishedFile(path, vae=state)
        return PublishedFile(path, model=state)
    found = [name for name in NETWORKS if content.get(name) is not None and content[name] != {}]
    if not {"model", "ema"} & set(found):
        raise UserError(
            f"{path} holds {first_keys(content)}: expected a training checkpoint (model, ema, "
            "...), a state dict of a SiT, or one of a VAE"
        )
    states = {name: state_dict(content[name], f"{name} of {path}") for name in found}
    step = content.get("steps", 0)
    step = step if type(step) is int and 0 <= step < 2**63 else 0
    return PublishedFile(path, **states, args=plain_settings(content.get("args")), step=step)


def read_discriminator(path: Path) -> State:
    """State dict of a NAME-discriminator-ckpt.pt, or of the discriminator in a checkpoint."""
    content = load_plain(path)
    return state_dict(content.get("discriminator", content.get("state_dict", content)), path)


def read_latent_stats(path: Path) -> tuple[Tensor, Tensor]:
    """Per-channel (mean, std) of latents, each (C,) float32; `UserError` if the file holds none.

    Two layouts are read, with tensors of shape (1, C, 1, 1): {latents_scale = 1/std,
    latents_bias = mean} of REPA-E, and {mean, std} of LightningDiT.
    """
    content = load_plain(path)
    inverse = {"latents_scale", "latents_bias"} <= set(content)
    mean, std = map(content.get, ("latents_bias", "latents_scale") if inverse else ("mean", "std"))
    if not (is_real(mean) and is_real(std)):
        raise UserError(
            f"{path} holds {first_keys(content)}: expected statistics of latents (latents_scale "
            "and latents_bias, both tensors)"
        )
    mean, std = mean.float().flatten(), std.float().flatten()
    std = 1 / std if inverse else std
    if len(mean) != len(std) or not mean.isfinite().all() or not (std.isfinite() & (std > 0)).all():
        raise UserError(f"{path}: expected as many finite means as positive finite scales")
    return mean, std


def is_real(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and is_plain(value) and not value.is_complex()


def first_keys(content: dict) -> str:
    return ", ".join(str(key)[:60] for key in list(content)[:8]) or "nothing"


def load_plain(path: Path) -> dict:
    """A .pt or .safetensors as a dict of tensors and plain values, on the CPU; `UserError` for a
    damaged file, and for a pickle that asks for anything else."""
    kind = what_is(path)
    if not os.path.isfile(path):
        why = "no such file" if kind == "absent" else f"this is {kind}, not a file"
        raise UserError(f"{path}: {why}; give a downloaded checkpoint")
    try:
        if kind == SAFETENSORS:
            return load_file(path)
        # mapped: the optimizers' moments, most of a checkpoint, are then never read
        mapped = zipfile.is_zipfile(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a hostile file makes the restricted unpickler raise anything
        why = explain_refusal(error, path)
        raise UserError(f"{path} is refused, and nothing of it was executed: {why}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def explain_refusal(error: Exception, path: Path) -> str:
    names = re.findall(r"GLOBAL ([\w.]+)", str(error))  # so torch names what a pickle asks for
    if names:
        return f"it asks for {names[0]}, which is neither a tensor nor a plain value"
    kind = what_is(path)
    if not kind.startswith("unreadable"):
        with path.open("rb") as file:
            kind += f", {type(error).__name__}; it begins with {file.read(16)!r}"
    return f"it is damaged, cut short or no file of tensors ({kind}); download it again"


def is_state(value: object) -> TypeGuard[dict]:
    held = value.values() if isinstance(value, dict) else ()
    return len(held) > 0 and all(isinstance(v, Tensor) for v in held)


def state_dict(state: object, origin: Path | str) -> State:
    """`state` without the prefixes of wrappers; `UserError` unless it is a dict of tensors."""
    if not is_state(state):
        raise UserError(f"{origin} is not a state dict: expected a dict of tensors")
    for key, value in state.items():
        if not is_plain(value):
            raise UserError(f"{origin}: tensor {key} is sparse, quantized or not stored in full")
    return {WRAPPERS.sub("", str(key)): value for key, value in state.items()}


def plain_settings(args: object) -> dict:
    """The settings of a training run, as far as JSON can hold them."""
    settings = vars(args) if isinstance(args, argparse.Namespace) else args
    settings = settings if isinstance(settings, dict) else {}
    return {str(k): v for k, v in settings.items() if is_plain_value(v)}


def is_plain_value(value: object) -> bool:
    """Whether JSON can hold a setting, and a line of text show it."""
    if isinstance(value, int | float):
        return value in Range()
    return value is None or (isinstance(value, str) and len(value) < LONGEST)


def require_new_folder(out: Path) -> None:
    """`UserError` unless `out` can be made: it is not there yet, or is an empty folder, and its
    place can be written."""
    if os.path.isdir(out):
        if os.access(out, os.R_OK) and not any(out.iterdir()):
            return
        raise UserError(f"{out} exists and is not empty: choose another, or delete it")
    if (kind := what_is(out)) != "absent":
        raise UserError(f"{out} is {kind}: choose another place for the folder to be written")
    place = next(p for p in out.absolute().parents if os.path.lexists(p))
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be made: {place} is {what_is(place)} that cannot be written")
