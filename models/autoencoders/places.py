"""Where the weights of a VAE lie that a user has named: in the hub, in a folder, or in a file."""

import os
import re
from pathlib import Path

from models.autoencoders.families import VAES
from models.autoencoders.names import ALIASES, short_name
from models.checks.errors import UserError, same_letters
from models.checks.file_kinds import WEIGHT_ENDINGS, advice_on_shards, what_is
from models.weights.configs import CONFIG, WEIGHTS
from models.weights.hub import snapshot_in
from models.weights.published import WeightFile

STEM = "diffusion_pytorch_model"
# how diffusers calls the weights in a folder, the first one that is there is taken; {} is the
# variant, e.g. ".fp16", or nothing
FOLDER_FILES = (f"{STEM}{{}}.safetensors", f"{STEM}.safetensors.index{{}}.json",
                f"{STEM}{{}}.bin", f"{STEM}.bin.index{{}}.json")  # fmt: skip
VARIANT = re.compile(
    rf"{STEM}(?:\.(?:safetensors|bin)\.index)?(\.(?!safetensors|bin)\w+)\.(?:safetensors|bin|json)"
)
STATE_FILES = (*WEIGHT_ENDINGS, ".sft", ".tar")
SETTING = "vae.weights={}"
IN_PLACE = "DIR in place of its name"  # wherever a VAE is named, in a config or behind a flag


def vae_weight_file(spec: str, weights: str | Path | None = "hub") -> WeightFile | None:
    """The file that `load_vae` will read, without reading it; None if the weights are random. For a
    diffusers folder, `companions` holds the config.json that is read with it."""
    spec = short_name(str(spec))
    if weights is None or (weights == "hub" and spec in VAES and not VAES[spec].repo):
        return None
    if weights == "hub":
        return file_of(spec)
    path = Path(weights)
    if os.path.isdir(path):
        return _file_in(path)
    return WeightFile(f"weights of {spec}", path=path, setting=SETTING)


def file_of(spec: str) -> WeightFile:
    """The weights that `spec` itself names: in the hub, in a local folder, or a file."""
    path = Path(spec)
    if not spec.strip():  # as a path, this would be the current folder
        raise UserError("the name of the VAE is empty: give a short name, file, folder or hub id")
    if spec in VAES:
        return _hub_file(VAES[spec].repo, None, VAES[spec].subfolder)
    if os.path.isdir(path):
        return _file_in(path)
    if os.path.exists(path):
        # the weights of a diffusers folder, named themselves
        named = path.name.startswith(STEM) and os.path.isfile(path.with_name(CONFIG))
        return WeightFile("a VAE's weights", path=path, companions=(CONFIG,) if named else ())
    hub = (
        spec.count("/") == 1 and path.suffix not in STATE_FILES and not spec.startswith((".", "/"))
    )
    if hub and not os.path.isdir(path.parent):
        repo, _, revision = spec.partition("@")
        return _hub_file(repo, revision or None, "", "vae")
    near = same_letters(spec, ALIASES)
    hint = f"did you mean {ALIASES[near]}?" if near else f"the short names are {', '.join(VAES)}"
    why = "" if what_is(path) == "absent" else f" (it is {what_is(path)})"
    raise UserError(f"no VAE {spec}{why}: not a short name, file, folder or hub id; {hint}")


def _hub_file(repo: str, revision: str | None, *subfolders: str) -> WeightFile:
    place = {"repo": repo, "revision": revision, "subfolders": subfolders}
    return WeightFile(WEIGHTS, companions=(CONFIG,), setting=IN_PLACE, **place)


def _file_in(folder: Path) -> WeightFile:
    """The weights of a diffusers folder, of `vae/` in it, or of a repository in the hub's cache."""
    folder = snapshot_in(folder)
    for place in (folder, folder / "vae"):
        if os.path.isfile(place / CONFIG):
            return WeightFile(
                WEIGHTS,
                path=_weights_in(place),
                companions=(CONFIG,),
                otherwise="save the VAE again with save_pretrained",
            )
    if advice := advice_on_shards(folder):
        hint = f"it is {advice}, and name that"
    elif (folder / "checkpoints").is_dir():
        hint = "of a run, name one of its checkpoints"
    elif files := sorted(path.name for path in folder.iterdir() if path.suffix in STATE_FILES):
        hint = f"of what is there, name a file: {', '.join(files[:4])}"
    else:
        hint = "name another folder"
    raise UserError(
        f"{folder} is no diffusers VAE: no {CONFIG} in it, nor in {folder / 'vae'}; {hint}"
    )


def _weights_in(folder: Path) -> Path:
    """The file with the weights in a diffusers folder: whole numbers before a variant of them
    (float16, ...), which is taken if it is the only one."""
    names = os.listdir(folder)
    variants = sorted({match[1] for name in names if (match := VARIANT.fullmatch(name))})
    for variant in ("", *variants):
        found = [name for each in FOLDER_FILES if (name := each.format(variant)) in names]
        if not found:
            continue
        if variant and len(variants) > 1:
            raise UserError(
                f"{folder} holds the weights in the variants {', '.join(v[1:] for v in variants)} "
                f"only: name one in place of the folder, as {folder / found[0]}"
            )
        return folder / found[0]
    return folder / WEIGHTS
