"""Checks of weight files: each one that the run will read is here, or can be downloaded."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata

from models.encoders import encoder_weight_file
from models.errors import UserError
from models.lpips import vgg_weight_file
from models.vae import vae_weight_file
from models.weights import WeightFile, short
from utils.checkpoint import DISCRIMINATOR, VAE_FOLDER
from utils.config.schema import Config
from utils.doctor.findings import Finding, check, fail, ok, warn
from utils.evaluation.metrics import METRICS, select_metrics
from utils.evaluation.networks import require_weights
from utils.evaluation.reference import Reference

TIMEOUT = 3  # seconds for one look at the network


@check("weights")
def check_weights(c: Config, start: Path | None) -> Iterator[Finding]:
    """A finding for each file that the run will read; `start` is the checkpoint it begins from."""
    files = list(needed_files(c, start))
    for name, find, *where in files:
        try:
            yield weight_file_status(find(*where), name)
        except UserError as error:
            yield fail(str(error), name)
    if c.eval.every:
        yield from check_evaluation(c)
    late = c.disc.weights or c.disc.pretrain_steps or c.loss.reg.gan_start
    if any(name == "disc" for name, *_ in files) and c.vae.weights and not late:
        yield warn(
            "it is random, and a pretrained VAE learns from it at once: set disc.weights=FILE, or "
            "let it learn first by disc.pretrain_steps or loss.reg.gan_start, a few thousand steps",
            "disc",
        )


def needed_files(c: Config, start: Path | None) -> Iterator[tuple]:
    """(name, what looks for the file, its arguments) for each file that `build_networks` reads."""
    vae = (str(start / VAE_FOLDER), "hub") if start else (c.vae.name, c.vae.weights)
    yield "vae", vae_weight_file, *vae
    if c.uses_encoder and not c.encoder.cached:
        for name, file in zip(c.encoder.names, c.encoder.weights or [None] * len(c.encoder.names)):
            yield "encoder", encoder_weight_file, name, file
    if c.vae.train and c.loss.reg.lpips:
        yield "lpips", vgg_weight_file, c.loss.reg.lpips_weights
    if c.uses_disc and not (start and (start / DISCRIMINATOR).is_file()):
        yield "disc", discriminator_file, c.disc.weights


def discriminator_file(weights: str | None) -> WeightFile | None:
    """The file that `disc.weights` names; None if the discriminator starts at random."""
    what = "a discriminator's weights"
    return WeightFile(what, path=Path(weights), setting="disc.weights={}") if weights else None


@check("eval")
def check_evaluation(c: Config) -> Iterator[Finding]:
    """Feature network and reference of the evaluations in training, which download nothing."""
    try:
        select_metrics(METRICS, tuple(c.eval.metrics))
        require_weights(c.eval.features, c.eval.weights)
        if c.eval.reference:
            Reference(c.eval.reference, c.data.resolution)
    except UserError as error:
        settings = "eval.features, eval.weights, eval.metrics, eval.reference"
        raise UserError(
            f"{error} (here these are {settings}; eval.every=0 leaves evaluation out)"
        ) from None
    yield ok(f"{c.eval.features} against {c.eval.reference or 'the training images'}")


def weight_file_status(file: WeightFile | None, name: str) -> Finding:
    """Where a weight file is, or whether it can be downloaded; `UserError` as `WeightFile.find`."""
    if file is None:
        return ok("random at the start", name)
    if path := file.find():
        return ok(str(path), name)
    if problem := download_problem(file):
        return fail(f"{file} is not on this machine, and {problem}: {file.remedy}", name)
    return ok(f"{file} will be downloaded at the start", name)


def download_problem(file: WeightFile) -> str | None:
    """Why a download would fail; None if it would begin. Fetches no content."""
    try:
        if not file.repo:
            request = urllib.request.Request(file.source, method="HEAD")
            urllib.request.urlopen(request, timeout=TIMEOUT).close()
        elif constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set"
        else:
            get_hf_file_metadata(file.source, timeout=TIMEOUT)  # with the user's own login
    # which HTTP library the hub client uses, hence which errors, depends on its version
    except Exception as error:
        return f"asking for it failed ({short(error)})"
    return None
