"""Turn a published file into a checkpoint directory (scripts/import_official.py)."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.autoencoders.stored import read_vae, which_scaling
from models.checks.errors import UserError
from models.discriminator import PatchGAN
from models.sit import SiT
from models.vae import VAE, load_vae, vae_from_state
from models.weights.configs import CONFIG
from utils.checkpoint import Contents, seal_checkpoint
from utils.files import sha256_file
from utils.published import files, networks, sit_conventions
from utils.published.files import PublishedFile
from utils.sampling.locate import locate_vae_spec
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
    source: dict[str, Any] = {"file": checkpoint.name, "args": published.args}
    source["sha256"] = sha256_file(published.file)
    reverse = False
    if published.sit:  # checked first: loading a VAE may take a while
        state["path"] = sit_conventions.interpolant_path(published.args, checkpoint)
        reverse, facts = examine_sit(published, time, bool(allow_learn_sigma))
        source |= facts
    found = find_vae(published, vae)
    disc = find_discriminator(published, discriminator)
    latent_stats, stats_origin = find_latent_stats(published, found, stats, scaling_factor)
    source |= {"vae": found.origin, "latent_norm": stats_origin}
    sit = ema = None
    if published.sit:
        sit, ema = build_sits(published, found, latent_stats, num_heads, reverse)
        latent_stats = ema.bn.stats()
        had = networks.indices(published.sit, "projectors")
        source["projectors"] = len(ema.projectors) or (
            "left out, as of a kind that is not known here" if had else "none"
        )
    state["source"] = source
    index = ModelIndex(path=state.get("path"))
    contents = Contents(found.vae, latent_stats, sit, ema, disc, index=index)
    seal_checkpoint(out.resolve(), published.step, contents.write, state)
    return state


def examine_sit(published: PublishedFile, time: str, sliced: bool) -> tuple[bool, dict[str, str]]:
    """(whether t = 1 is data, what to record of the SiT). sliced: the variance half of its last
    layer may be dropped. Raises `UserError` where that half is there and may not, and where the
    direction of time is not known."""
    path, facts = published.path, {}
    variance = sit_conventions.predicts_variance(published.sit or {}, path)
    dit = variance and time == "auto" and sit_conventions.is_dit(published)
    if dit and not sliced:
        raise UserError(
            f"{path} is a DiT by its name: it predicts noise, not velocity, so nothing can be "
            "sampled from it here; to start a run from its weights, give --allow-learn-sigma slice"
        )
    if variance and not sliced:
        raise UserError(
            f"{path} has a learn_sigma head (its last layer also predicts a variance): "
            "give --allow-learn-sigma slice to keep the velocity half"
        )
    if dit:
        reverse, facts["time"] = False, "as DiT counts it, 0 to 999"
        facts["predicts"] = "noise"
    else:
        reverse, why = sit_conventions.data_is_at_one(published, time)
        said = "t = 1 was data (original SiT): converted" if reverse else "t = 0 is data"
        facts["time"] = f"{said} ({why})"
    said = published.args.get("path_type")
    facts["interpolant"] = str(said) if said else "linear, assumed: the file names none"
    sets = [where or "the whole file" for name, where in published.where.items()
            if name in ("model", "ema")]  # fmt: skip
    facts["weights"] = " and ".join(sets) if len(sets) > 1 else f"{sets[0]}, used as raw and as EMA"
    if published.unread:
        facts["weights"] += f" (not the averaged {published.unread[:60]}, under no names of a SiT)"
    return reverse, facts


def find_vae(published: PublishedFile, spec: str | None) -> FoundVae:
    """The VAE in the file, or that of `--vae`, or the one that the file's settings name."""
    if published.has_vae:
        if spec:
            raise UserError(f"{published.path} holds its VAE: leave out --vae {spec}")
        if not published.sit:
            return FoundVae(load_vae(str(published.file)), published.path.name, published.file)
        # unlike load_vae, without a word on its scaling: the SiT's latent norm has its own
        state, scaling = read_vae(published.file)
        vae = vae_from_state(state, f"vae of {published.path}", scaling)
        return FoundVae(vae, published.path.name, None)
    spec = locate_vae_spec(spec or find_named_vae(published))
    return FoundVae(load_vae(spec), spec, Path(spec) if os.path.isfile(spec) else None)


def find_named_vae(published: PublishedFile) -> str:
    """The VAE that `args.vae_ckpt` of a checkpoint without one names: at that path, or beside the
    checkpoint. Only a file: what a checkpoint says must not start a download."""
    if (published.path / "vae" / CONFIG).is_file():  # a pipeline of diffusers
        return str(published.path / "vae")
    named = published.args.get("vae_ckpt")
    if not named:
        raise UserError(
            f"{published.path} holds no VAE and names none: give --vae (SiT's and REPA's own "
            "releases: --vae sdvae --scaling-factor 0.18215)"
        )
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
        given = f"--stats {file}" if file else f"--scaling-factor {scaling_factor}"
        unused = f" ({given} is not needed)" if file or scaling_factor is not None else ""
        return None, f"bn.* of the checkpoint{unused}"
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
    net = found.vae.net
    unsure = net.config.get("scaling_factor") is None and which_scaling(
        net.state_dict(), published.path
    )
    if known is None and (published.sit or unsure):
        why = "holds no latent norm, nor does its VAE" if published.sit else (
            "does not show how its latents are scaled")  # fmt: skip
        raise UserError(
            f"{published.path} {why}: give --stats NAME-latents-stats.pt, or --scaling-factor "
            "(0.18215 for Stable Diffusion 1 and 2, SiT, REPA and DiT; 0.13025 for SDXL)"
        )
    return known, "config of the VAE" if known else "none"


def build_sits(
    published: PublishedFile, found: FoundVae, stats: Stats | None, heads: int | None, reverse: bool
) -> tuple[SiT, SiT]:
    """The raw and the EMA network; the same one twice if the file has one set of weights. `reverse`
    converts from t = 1 as data. Raises `UserError` if the VAE has other latents."""
    assert published.sit is not None
    state = sit_conventions.with_todays_names(published.sit)
    aligned = sit_conventions.aligned_block(published.sit)
    args = published.args | ({"encoder_depth": aligned} if aligned else {})
    config = networks.sit_config(state, args, heads, published.path)
    config["latent_norm"] = "batch" if published.has_vae else "fixed"
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
        state = sit_conventions.with_todays_names(state)
        if sit_conventions.predicts_variance(state, origin):
            state = sit_conventions.without_variance(state)
        sits.append(networks.sit_from_state(state, config, stats, origin))
        if reverse:
            sit_conventions.reverse_time(sits[-1])
    return sits[0], sits[-1]
