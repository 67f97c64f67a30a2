"""What a published file holds: a training checkpoint, a SiT, a VAE, or statistics of latents.

Nothing of a pickle is executed (models/weights/reading.py). Wrappers are looked through:
dictionaries like "ema" or "state_dict", prefixes like "module." (models/weights/finding.py).
"""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from torch import Tensor

from models.autoencoders.others import refuse_tensors
from models.autoencoders.stored import FIRST as VAE_KEY
from models.checks.errors import UserError
from models.checks.file_kinds import WEIGHT_ENDINGS, advice_on_shards, what_is
from models.checks.values import Range
from models.weights.configs import CONFIG
from models.weights.finding import NotFound, each_tensor, find_state, tensor_names
from models.weights.loading import first_names
from models.weights.objects import Placeholder
from models.weights.reading import is_plain, read_plain, read_state
from utils.published.other_generators import name_generator

State = dict[str, Tensor]

# tensors by which a network is known
SIT_KEYS = (("x_embedder.proj.weight", "blocks.0.attn.qkv.weight"),)
DISC_KEYS = (("main.0.weight",),)
# all names of tensors in a SiT that can be imported
SIT_NAMES = re.compile(
    r"pos_embed|y_embedder\.embedding_table\.weight|(projectors|bn)\..+|"
    r"(x_embedder\.proj|t_embedder\.mlp\.[02]|final_layer\.(linear|adaLN_modulation\.1)|"
    r"(decoder_)?blocks\.\d+\.(attn\.(qkv|proj|q_norm|k_norm)|mlp\.fc[12]|adaLN_modulation\.1))"
    r"\.(weight|bias)"
)
# a dictionary or prefix of averaged weights: "ema", "model_ema1", "ema_state_dict", "swa_model"
AVERAGED = re.compile(r"(.+_)?(ema\d*|averaged|swa)(_.+)?", re.IGNORECASE)
# dictionaries in which averaged weights may stand beside others
INNER = ("state_dict", "model", "module")
# where training scripts keep their settings, in the file or beside it
SETTINGS = ("args", "config", "cfg", "hyper_parameters")
# names of weights in a folder of accelerate, diffusers or transformers
IN_FOLDER = (
    "diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin",
    "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json", "pytorch_model.bin.index.json",
)  # fmt: skip
PARTS = ("", "transformer", "unet")  # folders of a pipeline with its generator
LONGEST = 4096  # characters of a setting


@dataclass
class PublishedFile:
    """One published file or folder; None stands for a network that it does not hold."""

    path: Path  # as the user named it
    file: Path  # of weights: itself, or one in the folder
    model: State | None = None
    ema: State | None = None
    discriminator: State | None = None
    has_vae: bool = False  # read by models.vae.load_vae
    args: dict = field(default_factory=dict)  # settings of the training run, plain values alone
    step: int = 0
    # where in the file each network was, in words for a message: see `Found.where`
    where: dict[str, str] = field(default_factory=dict)
    # name of a tensor or dictionary of averaged weights, where they are under no names of a SiT
    unread: str = ""

    @property
    def sit(self) -> State | None:
        """The SiT that is sampled with: the EMA, or the raw weights where there is none."""
        return self.ema or self.model


def read_published(path: Path) -> PublishedFile:
    """Read a training checkpoint, a SiT or a VAE in whatever wrappers, or a folder of accelerate
    or diffusers with one. `UserError` for anything else, which it names if it knows it."""
    file = find_weights(path)
    content = read_content(file)
    averaged, raw = split_averaged(content)
    step = next((content[k] for k in ("steps", "step", "global_step") if k in content), 0)
    step = step if type(step) is int and 0 <= step < 2**63 else 0
    published = PublishedFile(path, file, args=read_settings(content, file), step=step)
    disc = content.get("discriminator")
    for name, part, keys in (
        ("model", raw, SIT_KEYS), ("ema", averaged, SIT_KEYS), ("discriminator", disc, DISC_KEYS)
    ):  # fmt: skip
        with suppress(NotFound):
            found = find_state(part, keys, path, prefer=(name, "state_dict"))
            setattr(published, name, found.state)
            published.where[name] = found.where
    if published.ema is None:
        # no counters, as n_averaged of torch's AveragedModel
        held = [f"{inside}{name}" for inside, name, value in each_tensor(averaged)
                if getattr(value, "ndim", 1)]  # fmt: skip
        held += [k for k, value in averaged.items() if isinstance(value, dict | list) and value]
        published.unread = next(iter(held), "")
    names = tensor_names(content)
    published.has_vae = any(f".{name}".endswith(f".{VAE_KEY}") for name in names)
    require_known(published, content, names)
    return published


def require_known(published: PublishedFile, content: dict, names: list[str]) -> None:
    """`UserError` for a file without a network that can be imported, which names what it holds."""
    path, sit = published.path, published.sit
    if published.has_vae and not sit:
        return
    if other := name_generator(sit or names):
        raise UserError(
            f"{path} is {other}: this project has no such network; the SiT of REPA-E, REPA, iREPA "
            "or the original release can be imported, and a VAE"
        )
    if not sit:
        refuse_tensors(names, path)
        raise UserError(
            f"{path} holds {first_keys(content)}: expected a training checkpoint (model, ema, "
            "...), a state dict of a SiT, or one of a VAE"
        )
    if others := [key for part in (published.model, published.ema) for key in part or ()
                  if not SIT_NAMES.fullmatch(key)]:  # fmt: skip
        raise UserError(
            f"{path} is another network: no SiT here has tensors {first_names(others)}; if they "
            "are not needed to sample, save the others in a file of their own"
        )


def find_weights(path: Path) -> Path:
    """The file of weights that `path` is, or that lies in the folder `path`; else `UserError`."""
    if not os.path.isdir(path):
        if not os.path.isfile(path):
            kind = what_is(path)
            why = "no such file" if kind == "absent" else f"this is {kind}, not a file"
            raise UserError(f"{path}: {why}; give a downloaded checkpoint")
        return path
    for pattern, what in (("sit_ema", "checkpoint"), ("[0-9]*/sit_ema", "run"),
                          ("checkpoints/[0-9]*/sit_ema", "run")):  # fmt: skip
        if any(path.glob(pattern)):
            raise UserError(f"{path} is a {what} of this project already: use it as it is")
    places = [path / part / name for part in PARTS for name in IN_FOLDER]
    if found := next((place for place in places if place.is_file()), None):
        return found
    files = sorted(p for end in WEIGHT_ENDINGS for part in ("", "checkpoints/")
                   for p in path.glob(f"{part}*{end}"))  # fmt: skip
    if len(files) == 1:
        return files[0]
    if files:
        listed = first_names([str(file.relative_to(path)) for file in files])
        raise UserError(f"{path} is a folder of {len(files)} weight files ({listed}): name one")
    if advice := advice_on_shards(path):
        raise UserError(f"{path} is {advice}, and name that")
    raise UserError(f"{path} is a folder without weights: none of {', '.join(IN_FOLDER[:3])}")


def read_content(path: Path) -> dict:
    """What a file holds, see `read_plain`: a dictionary, else `UserError`."""
    content = read_plain(path)
    if isinstance(content, Placeholder):  # a module that was saved whole
        content = {"module": content}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    return content


def split_averaged(content: dict, inner: tuple[str, ...] = INNER) -> tuple[dict, dict]:
    """(averaged weights, all else): by the name of a dictionary, or by a part of a tensor's."""
    averaged, rest = {}, {}
    for key, value in content.items():
        if any(AVERAGED.fullmatch(part) for part in str(key).split(".")):
            averaged[key] = value
        elif key in inner and isinstance(value, dict):
            averaged[key], rest[key] = split_averaged(value, ())
        else:
            rest[key] = value
    return averaged, rest


def read_settings(content: dict, file: Path) -> dict:
    """The settings of the training run, as far as JSON can hold them, those of inner groups by
    their own names: those in the file, or else the args.json that REPA-E writes beside its
    checkpoints, or the config.json of a folder of weights."""
    found = next((content[k] for k in SETTINGS if isinstance(content.get(k), dict)), None)
    beside = [file.with_name("args.json")]
    if file.parent.name == "checkpoints":
        beside.append(file.parent.parent / "args.json")
    if file.name in IN_FOLDER:
        beside.append(file.with_name(CONFIG))
    path = next((path for path in beside if path.is_file()), None)
    if found is None and path:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # of something else, perhaps
            found = None
    return plain_settings(found)


def plain_settings(found: object) -> dict:
    """The settings in nested dictionaries, by their own names, the outermost first."""
    waiting, seen, settings = [found], set(), {}
    for group in waiting:
        if not isinstance(group, dict) or id(group) in seen:  # a pickle may refer to one often
            continue
        seen.add(id(group))
        waiting += [value for value in group.values() if isinstance(value, dict)]
        for key, value in group.items():
            if is_plain_value(value):
                settings.setdefault(str(key), value)
    return settings


def read_discriminator(path: Path) -> State:
    """State dict of a NAME-discriminator-ckpt.pt, or of the discriminator in a checkpoint."""
    return read_state(path, DISC_KEYS, prefer=("discriminator", "state_dict"))


def read_latent_stats(path: Path) -> tuple[Tensor, Tensor]:
    """Per-channel (mean, std) of latents, each (C,) float32; `UserError` if the file holds none.

    Two layouts are read, with tensors of shape (1, C, 1, 1): {latents_scale = 1/std,
    latents_bias = mean} of REPA-E, and {mean, std} of LightningDiT.
    """
    content = read_content(path)
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


def is_plain_value(value: object) -> bool:
    if isinstance(value, bool | int | float):
        return value in Range()
    return value is None or (isinstance(value, str) and len(value) < LONGEST)


def first_keys(content: dict) -> str:
    return ", ".join(str(key)[:60] for key in list(content)[:8]) or "nothing"


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
