"""Checks of weight files: each one that the run will read is here, or can be downloaded."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata

from models.checks.errors import UserError, short
from models.encoders import encoder_weight_file
from models.lpips import perceptual_weight_file, vgg_weight_file
from models.vae import vae_weight_file
from models.weights.published import WeightFile
from utils.checkpoint import DISCRIMINATOR
from utils.config.schema import Config
from utils.data.base import Source
from utils.doctor.findings import Finding, check, fail, ok, warn
from utils.training.networks import uses_disc_weights, vae_spec
from utils.training.online_evaluation import check_evaluation
from utils.training.plan import Start, weight_checks

TIMEOUT = 3  # seconds for one look at the network


@check("weights")
def check_weights(c: Config, source: Source | None, found: Start | None) -> Iterator[Finding]:
    """A finding for each file that the run will read, which fits; `found`: what it begins from."""
    origin = found and found.origin
    files, failed = list(needed_files(c, origin)), set()
    for name, find, *where in files:
        try:
            yield weight_file_status(find(*where), name)
        except UserError as error:
            yield fail(str(error), name)
            failed.add(name)
    for name, fit in weight_checks(c, origin):
        try:
            fit() if name not in failed else None
        except UserError as error:
            yield fail(str(error), name)
    if c.eval.every:
        yield from check_evaluations(c, source)
    late = c.disc.weights or c.disc.pretrain_steps or c.loss.reg.gan_start
    if any(name == "disc" for name, *_ in files) and c.vae.weights and not late:
        yield warn(
            "it is random, and a pretrained VAE learns from it at once: set disc.weights=FILE, or "
            "let it learn first by disc.pretrain_steps or loss.reg.gan_start, a few thousand steps",
            "disc",
        )


def needed_files(c: Config, start: Path | None) -> Iterator[tuple]:
    """(name, what looks for the file, its arguments) for each file that `build_networks` reads."""
    yield "vae", vae_weight_file, *vae_spec(c, start)
    if c.uses_encoder and not c.encoder.cached:
        for name, file in zip(c.encoder.names, c.encoder.weights or [None] * len(c.encoder.names)):
            yield "encoder", encoder_weight_file, name, file
    if c.vae.train and c.loss.reg.lpips:
        yield "lpips", vgg_weight_file, c.loss.reg.lpips_weights
    if c.vae.train and c.loss.reg.perceptual:
        yield "perceptual", perceptual_weight_file, c.loss.reg.perceptual_net
    inherited = start is not None and (start / DISCRIMINATOR).is_file()
    if c.uses_disc and (uses_disc_weights(c, start) or not inherited):
        yield "disc", discriminator_file, c.disc.weights


def discriminator_file(weights: str | None) -> WeightFile | None:
    """The file that `disc.weights` names; None if the discriminator starts at random."""
    what = "a discriminator's weights"
    return WeightFile(what, path=Path(weights), setting="disc.weights={}") if weights else None


@check("eval")
def check_evaluations(c: Config, source: Source | None) -> Iterator[Finding]:
    """The evaluations in training are possible; they download nothing."""
    check_evaluation(c, source)
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
