"""Write the VAE of a checkpoint as a diffusers folder (scripts/export_vae.py)."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import HfApi

from models.autoencoders.names import published_vae
from models.checks.errors import UserError, short
from models.checks.file_kinds import what_is
from models.vae import load_vae
from utils.checkpoint import DISCRIMINATOR, VAE_FOLDER
from utils.data.base import Source
from utils.data.latent_stats import measure_latents
from utils.distributed import default_device
from utils.files import sha256_file, sync, sync_tree
from utils.published.files import require_new_folder
from utils.published.model_card import make_card, read_evaluation, read_run_settings
from utils.sampling.locate import locate_vae
from utils.sealed import STATE, read_state_json


def export_vae(
    checkpoint: Path,
    out: Path,
    *,
    images: Source | None = None,
    images_name: str = "",
    num_images: int = 4096,
    seed: int = 0,
    evaluation: Path | None = None,
    title: str | None = None,
) -> str:
    """Write the folder `out`: VAE, latent statistics, discriminator if there is one, model card.

    checkpoint: a checkpoint directory, a run, a diffusers folder, or a hub id (see `locate_vae`), a
    short name, or a weight file with a VAE in it.
    images: measure the statistics on `num_images` of these, in the order of `seed`; None = take
    those in the VAE's config. `images_name` names them in the card.
    evaluation: a record of `evaluate_fid.py --vae`. title: of the card; None = the name of `out`.
    Returns where the statistics come from, as a sentence. Raises `UserError`, and leaves nothing
    behind, if the checkpoint is not whole or has no statistics.
    """
    require_new_folder(out)
    state = {}
    if not (published_vae(checkpoint) or os.path.isfile(checkpoint)):
        checkpoint = locate_vae(checkpoint)
        state = read_checkpoint_state(checkpoint)
    vae = load_vae(str(checkpoint)).eval().requires_grad_(False)
    record = read_evaluation(evaluation) if evaluation else None
    if images is None:
        known = vae.latent_stats()
        if known is None:
            raise UserError(f"{checkpoint} holds no latent statistics: measure them with --data")
        origin = "Taken from the VAE's config; a training run writes those of its latent norm there"
        origin += " (std includes the norm's eps)"
    else:
        num_images = min(num_images, len(images))
        known = measure_latents(vae.to(default_device()), images, num_images, seed)
        vae.cpu()
        origin = (
            f"Measured in float64, as expectations over posterior samples, on {num_images} images "
            f"of {images_name} at {images.resolution} px, seed {seed}"
        )
    mean, std = (value.cpu() for value in known)
    title, stats = title or out.resolve().name, (mean, std, origin)
    card = make_card(title, vae, stats, state, read_run_settings(checkpoint, state), record)
    with new_folder(out.resolve()) as draft:
        vae.save(draft, mean, std)
        if os.path.isfile(checkpoint / DISCRIMINATOR):
            shutil.copyfile(checkpoint / DISCRIMINATOR, draft / DISCRIMINATOR)
        (draft / "README.md").write_text(card, encoding="utf-8")
    return origin


def read_checkpoint_state(folder: Path) -> dict:
    """The state.json of a checkpoint; {} for a mere diffusers folder."""
    if not os.path.isdir(folder):
        kind = what_is(folder)
        why = "no such folder" if kind == "absent" else f"this is {kind}, expected a folder"
        raise UserError(f"{folder}: {why}; name one like exps/NAME/checkpoints/0400000")
    if not os.path.lexists(folder / STATE):
        return {}
    state = read_state_json(folder)
    for name, digest in state.files.items():
        # a download has only what it was made for
        needed = (folder / name).exists() or name.startswith(f"{VAE_FOLDER}/")
        if fault := _fault_of(folder / name, digest) if needed else "":
            why = f"{name} is {fault}"
            raise UserError(f"{folder} is not a whole checkpoint: {why}; choose another")
    return {k: v for k, v in asdict(state).items() if v is not None}


def _fault_of(file: Path, digest: str) -> str:
    """What is wrong with a file of this sha256; "" if nothing is."""
    if not os.path.isfile(file):
        return what_is(file)
    try:
        return "" if sha256_file(file) == digest else "damaged"
    except OSError as error:
        return f"unreadable ({error.strerror})"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A draft beside `out` to be filled, which then takes its name; an error leaves nothing."""
    draft = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        sync_tree(draft)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync(out.parent)


def upload(folder: Path, repo: str) -> None:
    """Upload a folder to a hub repository, created if need be, and say where it is; `UserError` if
    that fails."""
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo)
    except Exception as error:  # which HTTP library, hence which error, depends on the hub client
        raise UserError(
            f"{folder} is written, but not uploaded to {repo} ({short(error, 160)}): once there "
            f"is a network and a login, run `hf upload {repo} {folder}`"
        ) from None
    print(f"uploaded to https://huggingface.co/{repo}")
