"""Turn a published file into a checkpoint directory (scripts/import_official.py)."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.checks.errors import UserError
from models.discriminator import PatchGAN
from models.sit import SiT
from models.vae import VAE, load_vae
from utils.checkpoint import Contents, seal_checkpoint
from utils.files import sha256_file
from utils.published import files, networks, sit_conventions
from utils.published.files import PublishedFile
from utils.sealed import ModelIndex

Stats = tuple[Tensor, Tensor]  # per-channel (mean, std) of latents, each (C,)


class FoundVae(NamedTuple):
    vae: VAE
    origin: str  # what to call where it came from
    file: Path | None  # of its own, beside which statistics of its latents may lie


def import_published(
    checkpoint: Path,
    out: Path,
    *,
    vae: str | None = None,
    stats: Path | None = None,
    scaling_factor: float | None = None,
    discriminator: Path | None = None,
    allow_learn_sigma: str | bool | None = None,
    num_heads: int | None = None,
    time: str = "auto",
) -> dict:
    """Write the checkpoint directory `out`, without optimizers; for the options see the script.

    Returns its state.json, without versions and hashes; "source" says where each part came from.
    Raises `UserError`, and leaves nothing behind, if a part is missing or does not fit.
    """
    files.require_new_folder(out)
    published = files.read_published(checkpoint)
    state = {"step": published.step, "imported": True, "optimizer_state": None}
    if published.sit:  # checked first: loading a VAE may take a while
        state["path"] = sit_conventions.interpolant_path(published.args, checkpoint)
        if sit_conventions.predicts_variance(published.sit, checkpoint) and not allow_learn_sigma:
            raise UserError(
                f"{checkpoint} has a learn_sigma head (its last layer also predicts a variance): "
                "give --allow-learn-sigma slice to keep the velocity half"
            )
    found = find_vae(published, vae)
    disc = find_discriminator(published, discriminator)
    latent_stats, stats_origin = find_latent_stats(published, found, stats, scaling_factor)
    source = {"file": checkpoint.name, "sha256": sha256_file(checkpoint), "args": published.args}
    source |= {"vae": found.origin, "latent_norm": stats_origin}
    sit = ema = None
    if published.sit:
        reverse = time == "sit" or (time == "auto" and sit_conventions.is_original_sit(published))
        sit, ema = build_sits(published, found, latent_stats, num_heads, reverse)
        latent_stats = ema.bn.stats()
        both = published.model and published.ema
        source["weights"] = "model and ema" if both else "one set, used as both"
        source["time"] = "t = 1 was data (original SiT): converted" if reverse else "t = 0 is data"
    state["source"] = source
    index = ModelIndex(path=state.get("path"))
    contents = Contents(found.vae, latent_stats, sit, ema, disc, index=index)
    seal_checkpoint(out.resolve(), published.step, contents.write, state)
    return state


def find_vae(published: PublishedFile, spec: str | None) -> FoundVae:
    """The VAE in the file, or that of `--vae`, or the one that the file's settings name."""
    if published.vae is not None:
        if spec:
            raise UserError(f"{published.path} holds its VAE: leave out --vae {spec}")
        vae = networks.vae_from_state(published.vae, f"vae of {published.path}")
        return FoundVae(vae, published.path.name, None if published.sit else published.path)
    spec = spec or find_named_vae(published)
    path = Path(spec)
    if not os.path.isfile(path):
        return FoundVae(load_vae(spec), spec, None)
    state = files.read_published(path).vae
    if state is None:
        raise UserError(f"--vae {path} holds no VAE: expected encoder.* and decoder.* tensors")
    return FoundVae(networks.vae_from_state(state, path), spec, path)


def find_named_vae(published: PublishedFile) -> str:
    """The VAE that `args.vae_ckpt` of a checkpoint without one names: at that path, or beside the
    checkpoint. Only a file: what a checkpoint says must not start a download."""
    named = published.args.get("vae_ckpt")
    if not named:
        raise UserError(f"{published.path} holds no VAE and names none: give --vae")
    for path in (Path(str(named)), published.path.parent / Path(str(named)).name):
        if os.path.isfile(path):  # unlike Path.is_file, False also for a name that is too long
            return str(path)
    where = "which is neither there nor beside the checkpoint"
    raise UserError(f"{published.path} names the VAE {named!r}, {where}: give --vae")


def find_discriminator(published: PublishedFile, file: Path | None) -> PatchGAN | None:
    """The discriminator in the checkpoint, or in the `--discriminator` file."""
    state, origin = published.discriminator, f"discriminator of {published.path}"
    if state is not None and file:
        raise UserError(f"{published.path} holds a discriminator: leave out --discriminator {file}")
    if file:
        state, origin = files.read_discriminator(file), file
    return None if state is None else networks.discriminator_from_state(state, origin)


def find_latent_stats(
    published: PublishedFile, found: FoundVae, file: Path | None, scaling_factor: float | None
) -> tuple[Stats | None, str]:
    """(statistics of the latents or None, where they come from).

    The SiT's own latent norm goes first; its statistics stay in its weights, hence None. Then
    `--scaling-factor`, `--stats`, a NAME-latents-stats.pt beside the VAE, the VAE's config.
    """
    if published.sit and any(key.startswith("bn.") for key in published.sit):
        return None, "bn.* of the checkpoint"
    channels = found.vae.latent_channels
    if scaling_factor is not None:
        std = torch.full((channels,), 1 / scaling_factor)
        return (torch.zeros(channels), std), f"--scaling-factor {scaling_factor}"
    beside = found.file and found.file.with_name(f"{found.file.stem}-latents-stats.pt")
    path = file or (beside if beside and beside.is_file() else None)
    if path is not None:
        stats = files.read_latent_stats(path)
        if len(stats[0]) != channels:
            raise UserError(f"{path} is of {len(stats[0])} channels, the VAE has {channels}")
        return stats, str(path)
    known = found.vae.latent_stats()
    if published.sit and known is None:
        raise UserError(
            f"{published.path} holds no latent norm, nor does its VAE: give --stats "
            "NAME-latents-stats.pt, or --scaling-factor (0.18215 for SiT and DiT releases)"
        )
    return known, "config of the VAE" if known else "none"


def build_sits(
    published: PublishedFile, found: FoundVae, stats: Stats | None, heads: int | None, reverse: bool
) -> tuple[SiT, SiT]:
    """The raw and the EMA network; the same one twice if the file has one set of weights. `reverse`
    converts from t = 1 as data. Raises `UserError` if the VAE has other latents."""
    assert published.sit is not None
    config = networks.sit_config(published.sit, published.args, heads, published.path)
    config["latent_norm"] = "batch" if published.vae else "fixed"
    if config["in_channels"] != found.vae.latent_channels:
        raise UserError(
            f"{published.path} makes latents of {config['in_channels']} channels, the VAE "
            f"({found.origin}) decodes {found.vae.latent_channels}: give its own with --vae"
        )
    sits = []
    for name, state in (("model", published.model), ("ema", published.ema)):
        if state is None:
            continue
        origin = f"{name} of {published.path}"
        if sit_conventions.predicts_variance(state, origin):
            state = sit_conventions.without_variance(state)
        sits.append(networks.sit_from_state(state, config, stats, origin))
        if reverse:
            sit_conventions.reverse_time(sits[-1])
    return sits[0], sits[-1]
