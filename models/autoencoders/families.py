"""The families of autoencoders, and the table of published ones. A new family is added here alone.

A family is what the VAEs of one diffusers class have in common: how they are called, and which of
their settings mean what. For a class that differs from these, write an adapter (a subclass of
`VAEFamily`), name it in `FAMILIES`, and give it a row in `ARCHITECTURES` and in `VAES`.
This module imports neither torch nor diffusers, which take seconds, until a network is built.

x image in [-1, 1], (N, 3, H, W). z latent, (N, C, h, w). moments (N, 2C, h, w): of the Gaussian
posterior q(z | x), first the means, then the log-variances.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class VAEFamily(ABC):
    """Adapter for one diffusers class. `net` is a network of it, `config` its diffusers config."""

    # name of the class in diffusers
    diffusers_class = ""
    # shape that the class itself takes: for users of the exported folder, who have plain diffusers
    input_shape = "(N, 3, H, W)"
    # shape in which per-channel statistics (C,) broadcast over the latents of that class
    stats_shape = (1, -1, 1, 1)
    # what is saved beside per-channel statistics, so that pipelines which apply both stay right
    saved_with_stats: ClassVar[Mapping[str, float]] = {}
    # a parameter with one of these in its name is never used for single images
    unused_parameters: tuple[str, ...] = ()

    @abstractmethod
    def prepare(self, net: Any) -> None:
        """Exchange layers, in place, so that the network is fast and exact under autocast; the
        numbers without autocast stay."""

    @abstractmethod
    def encode(self, net: Any, x: Tensor) -> Tensor:
        """Images => moments."""

    @abstractmethod
    def decode(self, net: Any, z: Tensor) -> Tensor:
        """Latents => images around [-1, 1], not clamped."""

    def latent_channels(self, config: Mapping) -> int:
        return config["latent_channels"]

    def downsample_factor(self, config: Mapping) -> int:
        """Pixels of an image's side for one cell of the latent's."""
        return 2 ** (len(config["block_out_channels"]) - 1)


class KLFamily(VAEFamily):
    """Stable Diffusion, SD3.5, FLUX, IN-VAE, VA-VAE."""

    diffusers_class = "AutoencoderKL"
    # SDXL's pipeline multiplies by scaling_factor also where it knows the statistics
    saved_with_stats: ClassVar = {"scaling_factor": 1.0, "shift_factor": 0.0}

    def prepare(self, net: Any) -> None:
        from models.layers.kl_blocks import prepare

        prepare(net)

    def encode(self, net: Any, x: Tensor) -> Tensor:
        h = net.encoder(x)
        return net.quant_conv(h) if net.quant_conv is not None else h

    def decode(self, net: Any, z: Tensor) -> Tensor:
        return net.decoder(net.post_quant_conv(z) if net.post_quant_conv is not None else z)


class QwenFamily(VAEFamily):
    """Qwen-Image: a video autoencoder, used on single frames."""

    diffusers_class = "AutoencoderKLQwenImage"
    input_shape = "(N, 3, 1, H, W): one frame"
    stats_shape = (1, -1, 1, 1, 1)
    # the temporal resampling
    unused_parameters = ("time_conv",)

    def prepare(self, net: Any) -> None:
        from models.layers.autocast import leave_autocast

        ends = (net.encoder.conv_out, net.quant_conv, net.post_quant_conv, net.decoder.conv_out)
        for layer in ends:
            leave_autocast(layer)

    def encode(self, net: Any, x: Tensor) -> Tensor:
        return net.quant_conv(net.encoder(x.unsqueeze(2))).squeeze(2)

    def decode(self, net: Any, z: Tensor) -> Tensor:
        # not the class's own decode: it clamps, which stops the gradient where a pixel saturates
        return net.decoder(net.post_quant_conv(z.unsqueeze(2))).squeeze(2)

    def latent_channels(self, config: Mapping) -> int:
        return config["z_dim"]

    def downsample_factor(self, config: Mapping) -> int:
        return 2 ** len(config["temperal_downsample"])


FAMILIES = {family.diffusers_class: family for family in (KLFamily(), QwenFamily())}


# --------------------------------------------------------------------------------------
# Architectures: diffusers configs.


def _kl(channels, latent: int, *, attn=False, quant=True, tiny=False, mid=True) -> dict:
    """Config of an AutoencoderKL. channels: of each level, finest first. latent: channels C.
    attn: attention at the coarsest level also outside the middle block, as in CompVis f16.
    mid: attention in the middle block. tiny: small, for tests and the quickstart."""
    down, up = ["DownEncoderBlock2D"] * len(channels), ["UpDecoderBlock2D"] * len(channels)
    if attn:
        down[-1], up[0] = "AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D"
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
        "latent_channels": latent,
        "layers_per_block": 1 if tiny else 2,
        "norm_num_groups": 8 if tiny else 32,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
        "mid_block_add_attention": mid,
        "sample_size": 256,  # the class default 32 would make tiling, once enabled, act on 64 px
    }


def _qwen(base: int, mult: list[int], num_res_blocks: int) -> dict:
    """Config of an AutoencoderKLQwenImage. base: channels of the finest level. mult: multiples of
    it, level by level."""
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "base_dim": base,
        "z_dim": 16,
        "dim_mult": mult,
        "num_res_blocks": num_res_blocks,
        "temperal_downsample": [False, True, True],  # diffusers' spelling
    }


# fF dC: downsample factor F, C latent channels
ARCHITECTURES = {
    "f8d4": _kl((128, 256, 512, 512), 4),
    "f8d16": _kl((128, 256, 512, 512), 16, quant=False),
    "f16d32": _kl((128, 128, 256, 256, 512), 32, attn=True),
    "qwen": _qwen(96, [1, 2, 4, 4], 2),
    "tiny-f2d4": _kl((32, 64), 4, tiny=True, mid=False),
    "tiny-f4d8": _kl((16, 32, 64), 8, tiny=True, mid=False),
    "tiny-f8d4": _kl((8, 8, 16, 16), 4, tiny=True),
    "tiny-f8d16": _kl((8, 8, 16, 16), 16, quant=False, tiny=True),
    "tiny-f16d32": _kl((8, 8, 8, 8, 16), 32, attn=True, tiny=True),
    "tiny-qwen": _qwen(8, [1, 1, 2, 2], 1),
}


# --------------------------------------------------------------------------------------
# Published VAEs.


@dataclass(frozen=True)
class PublishedVAE:
    """What a short name stands for."""

    # key of `ARCHITECTURES`
    architecture: str
    # Hugging Face repository of its weights; "" = none are published, the name means random ones
    repo: str = ""
    # folder of the repository
    subfolder: str = ""
    # the published config's own settings, for weight files that come without one; they are kept
    # when such a VAE is saved, and used nowhere in training
    scalars: Mapping[str, float] | None = None


SD = {"scaling_factor": 0.18215, "shift_factor": None}
SDXL = {"scaling_factor": 0.13025, "shift_factor": None}
FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
SD35 = {"scaling_factor": 1.5305, "shift_factor": 0.0609}

VAES = {
    "sdvae": PublishedVAE("f8d4", "stabilityai/sd-vae-ft-mse", scalars=SD),
    "sdvae-ema": PublishedVAE("f8d4", "stabilityai/sd-vae-ft-ema", scalars=SD),
    "sdxl": PublishedVAE("f8d4", "stabilityai/sdxl-vae", scalars=SDXL),
    "invae": PublishedVAE("f16d32", "REPA-E/invae"),
    "vavae": PublishedVAE("f16d32", "REPA-E/vavae-hf"),
    "flux": PublishedVAE("f8d16", "black-forest-labs/FLUX.1-dev", "vae", FLUX),
    "sd3.5": PublishedVAE("f8d16", "stabilityai/stable-diffusion-3.5-large", "vae", SD35),
    "qwenimage": PublishedVAE("qwen", "Qwen/Qwen-Image", "vae"),
    "e2e-sdvae": PublishedVAE("f8d4", "REPA-E/e2e-sdvae-hf", scalars=SD),
    "e2e-invae": PublishedVAE("f16d32", "REPA-E/e2e-invae-hf"),
    "e2e-vavae": PublishedVAE("f16d32", "REPA-E/e2e-vavae-hf"),
    "e2e-flux": PublishedVAE("f8d16", "REPA-E/e2e-flux-vae", scalars=FLUX),
    "e2e-sd3.5": PublishedVAE("f8d16", "REPA-E/e2e-sd3.5-vae", scalars=SD35),
    "e2e-qwenimage": PublishedVAE("qwen", "REPA-E/e2e-qwenimage-vae"),
    "tiny-f2d4": PublishedVAE("tiny-f2d4"),
    "tiny-f4d8": PublishedVAE("tiny-f4d8"),
    "tiny-f8d4": PublishedVAE("tiny-f8d4"),
    "tiny-f8d16": PublishedVAE("tiny-f8d16"),
    "tiny-f16d32": PublishedVAE("tiny-f16d32"),
    "tiny-qwen": PublishedVAE("tiny-qwen"),
}


def config_of(name: str) -> dict:
    """diffusers config of a short name, with `_class_name`."""
    row = VAES[name]
    return ARCHITECTURES[row.architecture] | dict(row.scalars or {})
