"""The settings of the loss: weights and kinds of all terms. Read with schema.py."""

from dataclasses import dataclass, field
from typing import Literal

from loss.interpolant import PATHS
from utils.config.fields import MOST_STEPS, choice, path_or
from utils.records import number


@dataclass
class DiffusionConfig:
    """The diffusion loss L_DIFF. Its weight in the SiT phase is 1."""

    # Interpolant between data and noise (loss/interpolant.py).
    path: str = choice("linear", PATHS)
    # Distribution of the time t.
    time: Literal["uniform", "lognormal"] = "uniform"
    # Weight of L_DIFF in the VAE's loss. 0 = the paper's stop-gradient; 1 = naive, which collapses.
    vae: float = number(0.0, at_least=0, at_most=1e6)


@dataclass
class AlignConfig:
    """The alignment loss L_REPA. If both weights are 0, no encoder is loaded."""

    # Weight of L_REPA in the loss of the SiT.
    sit: float = number(0.5, at_least=0, at_most=1e6)
    # Weight of L_REPA in the loss of the VAE.
    vae: float = number(1.5, at_least=0, at_most=1e6)
    # Number of the SiT block (the first is 1) whose output is aligned.
    depth: int = number(8, at_least=1, at_most=512)
    # iREPA: 0.6 = share of the mean taken off features before division by their std. 0 = neither.
    spatial_norm: float = number(0.0, at_least=0, at_most=1)


@dataclass
class RegConfig:
    """The VAE's own loss L_REG. A term of weight 0 is not computed, nor anything loaded for it."""

    # Weight of the pixel loss, averaged over pixels.
    pixel: float = number(1.0, at_least=0, at_most=1e6)
    # l1 = absolute error, as in the published runs; mse = squared error, as in the paper's text.
    pixel_kind: Literal["l1", "mse"] = "l1"
    # Weight of LPIPS (VGG-16).
    lpips: float = number(1.0, at_least=0, at_most=1e6)
    # torchvision's weight file of VGG-16. null = the one in the cache of torch.hub.
    lpips_weights: str | None = path_or(None)
    # true = VGG sees [-3, 1] instead of [-1, 1], as in the published runs.
    lpips_double_scaling: bool = False
    # Weight of the distance in the features of perceptual_net, beside LPIPS or in its place.
    perceptual: float = number(0.0, at_least=0, at_most=1e6)
    # NAME as in encoder.names, e.g. timm:resnet18 (published weights), or NAME@FILE.
    perceptual_net: str | None = path_or(None, "[^@]*@")
    # Weight of the KL divergence, summed over the latent and averaged over images.
    kl: float = number(1e-6, at_least=0, at_most=1e6)
    # Weight of the generator's GAN loss, fixed. 0 = no discriminator.
    gan: float = number(0.1, at_least=0, at_most=1e6)
    # First step, after disc.pretrain_steps, with a GAN term. The discriminator learns from step 0.
    gan_start: int = number(0, at_least=0, at_most=MOST_STEPS)
    # Weight of the LeCam regularisation in the discriminator's loss.
    lecam: float = number(0.0, at_least=0, at_most=1e6)


@dataclass
class LossConfig:
    """Weights and kinds of all loss terms."""

    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    reg: RegConfig = field(default_factory=RegConfig)
