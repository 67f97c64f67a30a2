"""Autoencoders of other kinds, which are recognised so that they can be refused by name.

What is trained here is a Gaussian posterior over the latent of a single image. Most autoencoders
beside those of `families.py` have no posterior, or are made for videos.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from models.autoencoders.families import FAMILIES
from models.checks.errors import UserError, shown


class Other(NamedTuple):
    """A kind of autoencoder: what it is, its classes in diffusers, and a pattern for the names of
    tensors that every autoencoder of this kind has, and no VAE of `families.py`. `beside`: another
    one that must be found too."""

    what: str
    classes: tuple[str, ...]
    tensors: str
    beside: str = ""


OTHERS = (
    Other("a VQ autoencoder, whose latents are codes", ("VQModel",), r"(^|\.)quantizer?\."),
    Other("FLUX.2's VAE, which packs and normalises its latents itself", ("AutoencoderKLFlux2",),
          r"^bn\.running_mean$", r"^encoder\."),  # a SiT has such statistics, too
    Other("DC-AE, which has no posterior", ("AutoencoderDC",),
          r"(^|\.)(en|de)coder\.(stages\.\d+\.op_list|project_in|(down|up)_blocks\.\d+\.\d+)\."),
    Other("a tiny autoencoder (TAESD), which has no posterior", ("AutoencoderTiny",),
          r"^((taesd_)?(en|de)coder\.(layers\.)?)?\d+\.conv\.0\.weight$"),
    Other("a consistency decoder", ("ConsistencyDecoderVAE",), r"(^|\.)decoder_unet\."),
    Other("a VAE for inpainting, whose decoder also takes a mask", ("AsymmetricAutoencoderKL",),
          r"(^|\.)decoder\.condition_encoder\."),
    Other("a VAE under Wan's own names, for videos (of Qwen-Image, take vae.name=qwenimage)",
          (), r"(^|\.)(en|de)coder\.middle\.0\.residual\.0\.gamma$"),
    Other("Stable Video Diffusion's VAE, for videos", ("AutoencoderKLTemporalDecoder",),
          r"(^|\.)decoder\..*(time_stack|time_mix_conv|temporal_res_block|time_conv_out)\."),
    Other("a VAE for videos", tuple(f"AutoencoderKL{name}" for name in (
          "Allegro", "CogVideoX", "Cosmos", "HunyuanVideo", "HunyuanVideo15", "LTXVideo",
          "LTX2Video", "Magvit", "Mochi", "Wan")),
          r"(^|\.)encoder\.(conv_in\.conv(_s)?|temp_conv_in|block_in\.resnets\.0\.conv1\.conv)\."),
)  # fmt: skip


def refuse_class(config: Mapping, origin) -> None:
    """`UserError` unless a diffusers config is of a class of `FAMILIES`."""
    name = config.get("_class_name")
    if isinstance(name, str) and name in FAMILIES:
        return
    known = " or ".join(FAMILIES)
    if name is None:
        raise UserError(f"config of {origin} names no _class_name: expected that of a {known}")
    if other := next((other for other in OTHERS if name in other.classes), None):
        raise UserError(f"{origin} is {other.what} ({name}): expected an {known}")
    what = shown(name).strip("'")
    if what.startswith("Autoencoder"):
        raise UserError(f"{origin} is of the class {what}, which is not taken: expected {known}")
    raise UserError(f"{origin} is a {what}, not a VAE: expected {known}")


def refuse_tensors(names: Iterable[str], origin) -> None:
    """`UserError` if tensors of these names are an autoencoder of another kind."""
    names = list(names)
    for other in OTHERS:
        found = next((name for name in names if re.search(other.tensors, name)), None)
        if found and any(re.search(other.beside, name) for name in names):
            raise UserError(
                f"{origin} is {other.what}, as its {found[:80]} shows: expected an "
                f"{' or '.join(FAMILIES)}"
            )
