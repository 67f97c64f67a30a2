"""Every setting of a run, with its default, unit, range and meaning.

A setting is named by its path: `vae.optim.lr` is the field `lr` of the `optim` of `VaeConfig`.
The defaults are the published recipe of REPA-E on ImageNet-256. utils/config/validate.py checks the
ranges, and which settings cannot be used together; utils/config/resuming.py says which ones a
resumed run may change. Upper ends of ranges keep a slip of the finger from taking all memory.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from models.checks.errors import UserError
from models.sizes import SIZES
from utils.config.fields import INIT_NEW, MOST_STEPS, choice, path_or
from utils.config.looking import EvalConfig, PreviewConfig
from utils.config.losses import LossConfig
from utils.records import Range, number


@dataclass
class OptimConfig:
    """AdamW of one network. A step is one optimizer step of that network."""

    # Learning rate after the warm-up. Use 2e-5 for a VAE that starts from FLUX, SD3.5, Qwen-Image.
    lr: float = number(1e-4, at_least=0)
    # Decay of AdamW's average of the gradient.
    beta1: float = number(0.9, at_least=0, below=1)
    # Decay of AdamW's average of the squared gradient.
    beta2: float = number(0.999, at_least=0, below=1)
    # Added to AdamW's denominator.
    eps: float = number(1e-8, above=0)
    # Decoupled weight decay.
    weight_decay: float = number(0.0, at_least=0)
    # Largest gradient norm of this network; larger gradients are scaled down. 0 = no clipping.
    clip: float = number(1.0, at_least=0)
    # Number of steps in which the learning rate rises linearly to `lr`. 0 = no warm-up.
    warmup_steps: int = number(0, at_least=0, at_most=MOST_STEPS)


@dataclass
class RunConfig:
    """The run: its length, its precision, its folder and what it writes."""

    # The run writes everything to the folder `out`/`name`; a name has no "/".
    name: str = "repae"
    # Parent folder of all runs.
    out: str = path_or("exps")
    # Seed of the initial weights, the order of the data, and every random number of training.
    seed: int = number(0, at_least=0, at_most=2**63 - 1)
    # Number of optimizer steps. 400,000 steps of 256 images are 80 epochs of ImageNet.
    steps: int = number(400_000, at_least=1, at_most=MOST_STEPS)
    # Images in one optimizer step, counted over all ranks and micro-batches.
    batch_size: int = number(256, at_least=1, at_most=10**6)
    # Number of micro-batches into which each rank cuts its images of one optimizer step.
    accumulation: int = number(1, at_least=1, at_most=10**6)
    # Number format of the forward passes (autocast). The weights are float32 in any case.
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    # true = allow TF32 in the float32 operations that remain, on GPUs that have it.
    tf32: bool = True
    # true = compile every network, frozen ones included, with torch.compile.
    compile: bool = False
    # reduce-overhead = replay CUDA graphs, which helps networks too small to fill the GPU.
    compile_mode: Literal["default", "reduce-overhead"] = "default"
    # Networks whose activations are computed again in the backward pass: less memory, and slower.
    checkpointing: Literal["none", "vae", "sit", "both"] = "none"
    # true = channels-last (NHWC) convolutions in the networks of L_REG. null = on GPUs alone.
    channels_last: bool | None = None
    # Number format of LPIPS: tf32 (float32 where run.tf32=false), or fp16 with a loss scale.
    lpips_precision: Literal["tf32", "fp16"] = "tf32"
    # MiB of gradients that ranks average at a time, while the backward pass computes the next ones.
    bucket_mb: int = number(25, at_least=1, at_most=10_000)
    # true = each rank keeps a share of the optimizers' state and of the EMA; all else is the same.
    shard_optimizer: bool = False
    # auto = continue from this run's newest complete checkpoint; never; or a checkpoint folder, or
    # another run for its newest one.
    resume: str = path_or("auto")
    # Checkpoint folder, or a run for its newest one, whose weights a new run starts with, or null.
    # Then vae.name, if not given, is that of its VAE, vae.weights null; disc.weights comes first.
    init_from: str | None = path_or(None)
    # What may be new where that does not fit: projectors (of other encoders), classes (their rows),
    # pos_embed (of another number of tokens), disc (of another shape).
    init_new: list[str] = field(default_factory=list, metadata={"choices": INIT_NEW})
    # Names of settings, e.g. [vae.optim.lr], that a resumed run may change although they change it.
    allow_change: list[str] = field(default_factory=list)
    # What follows a loss or gradient that is not finite: stop = end the run, exit code 1; skip =
    # leave out that update; rollback = go back to the newest checkpoint and leave out that step.
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    # Number of skips or rollbacks, and of updates that fp16 skips in a row, after which a run ends.
    max_nonfinite: int = number(20, at_least=1, at_most=MOST_STEPS)
    # Numbers of steps (0-based) that are left out: known to be bad, or an exact resume meets them.
    skip_steps: list[int] = field(
        default_factory=list, metadata={"range": Range(at_least=0, at_most=MOST_STEPS)}
    )
    # Minutes that a rank waits for another one before the run ends and names the missing rank.
    rank_timeout: float = number(10.0, above=0, at_most=10_000)
    # Minutes that the end of the run waits for room on a full disk before its last save fails.
    disk_wait: float = number(10.0, at_least=0, at_most=10_000)
    # Number of steps between two log lines. A line holds the averages over these steps.
    log_every: int = number(100, at_least=1, at_most=MOST_STEPS)
    # Number of steps between two checkpoints.
    save_every: int = number(10_000, at_least=1, at_most=MOST_STEPS)
    # Number of newest checkpoints that are kept.
    keep_last: int = number(3, at_least=1, at_most=MOST_STEPS)
    # Checkpoints at multiples of this number of steps are never deleted. 0 = no such checkpoints.
    milestone_every: int = number(100_000, at_least=0, at_most=MOST_STEPS)
    # Where curves are written beside metrics.jsonl: tensorboard, wandb. [] = nowhere.
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])


@dataclass
class DataConfig:
    """The training images."""

    # Kind of data: a name in utils/data/registry.py.
    source: str = "packed"
    # Folder of the data, or a file. null for data that come with the code.
    path: str | None = path_or(None)
    # Where the classes come from: folder = the folders of the images; none = one class; or a file:
    # json, jsonl, csv, lines of `name label`. auto = dataset.json if there is one, else folder.
    labels: str | None = path_or("auto")
    # Folder written by scripts/cache_latents.py; the frozen VAE is then not run. null = no cache.
    latents: str | None = path_or(None)
    # Part of the data, if the source has parts: train or test of the digits. all = everything.
    split: str = "all"
    # Height and width of the images, in pixels.
    resolution: int = number(256, at_least=1, at_most=8192)
    # true = turn pictures as their EXIF data say. ADM and the published recipe do not.
    exif: bool = False
    # Values of 16-bit grey pictures that become black and white, e.g. [0,4095]. [] = 0 and 65535.
    depth_range: list[int] = field(
        default_factory=list, metadata={"range": Range(at_least=0, at_most=65535)}
    )
    # Number of classes that the data must have. null = accept whatever number it has.
    num_classes: int | None = number(None, at_least=1, at_most=10**6)
    # true = mirror half of the images. The published recipe does not.
    hflip: bool = False
    # Number of unreadable images of a folder that are replaced by others before the run stops.
    max_bad_images: int = number(100, at_least=0, at_most=MOST_STEPS)
    # Loader processes of each rank. 0 = load in the training process.
    workers: int = number(8, at_least=0, at_most=128)


@dataclass
class VaeConfig:
    """The autoencoder."""

    # Short name (models/autoencoders/families.py), hub id, checkpoint, run, diffusers folder, or a
    # weight file with a VAE in it.
    name: str = path_or("sdvae")
    # hub = the published weights; a folder or file; null = those of run.init_from, or random.
    weights: str | None = path_or("hub")
    # true = REPA-E, which trains it. false = frozen, as in REPA and plain SiT.
    train: bool = True
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class SitConfig:
    """The diffusion transformer. depth, hidden_size, num_heads and patch_size override `size`."""

    # SiT-{S,B,L,XL}/{1,2,4,8}: one of the published shapes; the number is the patch size.
    size: str = choice("SiT-XL/2", SIZES)
    # Number of blocks. null = that of `size`.
    depth: int | None = number(None, at_least=1, at_most=512)
    # Width D of the tokens, a multiple of 4 x num_heads. null = that of `size`.
    hidden_size: int | None = number(None, at_least=1, at_most=32_768)
    # Number of attention heads. null = that of `size`.
    num_heads: int | None = number(None, at_least=1, at_most=1024)
    # Height and width of a patch, in latent pixels. null = that of `size`.
    patch_size: int | None = number(None, at_least=1, at_most=1024)
    # true = normalise queries and keys.
    qk_norm: bool = False
    # Share of the labels replaced by the null label. 0 = no null label, hence no guidance.
    class_dropout_prob: float = number(0.1, at_least=0, below=1)
    # mlp = three linear layers, as published; conv = one 3x3 convolution, as in iREPA.
    projector: Literal["mlp", "conv"] = "mlp"
    # Width of the two hidden layers of the mlp projector.
    projector_dim: int = number(2048, at_least=1, at_most=65_536)
    # The optimizer of the SiT and its projectors.
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class DiscConfig:
    """The PatchGAN discriminator of the GAN loss."""

    # Number of its convolutions of stride 2, each of which halves the image.
    layers: int = number(3, at_least=1, at_most=10)
    # Channels of its first convolution.
    channels: int = number(64, at_least=1, at_most=1024)
    # batch norm, as published, or group norm: micro-batches then give the whole batch's gradient.
    norm: Literal["batch", "group"] = "batch"
    # First steps, of run.steps, that train it alone, on reconstructions of the initial VAE.
    pretrain_steps: int = number(0, at_least=0, at_most=MOST_STEPS)
    # A safetensors file, or a published -discriminator-ckpt.pt. null = that of run.init_from, or
    # without it random weights.
    weights: str | None = path_or(None)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class LatentNormConfig:
    """The batch norm between the VAE and the SiT."""

    # false = normalise by the statistics of the initial VAE, which are never updated.
    enabled: bool = True
    # Number of images on which these statistics are measured if the initial VAE has none.
    stats_images: int = number(4096, at_least=1, at_most=10**9)


@dataclass
class EncoderConfig:
    """The frozen vision encoders whose features the alignment loss compares with."""

    # Short names (models/backbones/table.py), published names (facebook/dinov2-base), or timm:NAME.
    names: list[str] = field(default_factory=lambda: ["dinov2-b"])
    # A weight file or folder (or null = the published one) for each name. [] = the published ones.
    weights: list[str | None] = field(default_factory=list, metadata={"path": ""})
    # Feature tokens per side of the image. null = data.resolution / 16.
    grid: int | None = number(None, at_least=1, at_most=1024)
    # true = read their features from the cache data.latents; no encoder is loaded.
    cached: bool = False


@dataclass
class EmaConfig:
    """The moving average of the SiT's weights and latent-norm statistics: what is sampled."""

    # Decay per optimizer step.
    decay: float = number(0.9999, at_least=0, below=1)
    # true = decay of min(decay, (1 + step) / (10 + step)), for short runs.
    warmup: bool = False


@dataclass
class Config:
    """All settings of a run, by section."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    sit: SitConfig = field(default_factory=SitConfig)
    disc: DiscConfig = field(default_factory=DiscConfig)
    latent_norm: LatentNormConfig = field(default_factory=LatentNormConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.out) / self.run.name

    @property
    def uses_encoder(self) -> bool:
        return self.loss.align.sit > 0

    @property
    def encoder_grid(self) -> int:
        """Feature tokens per side of the image."""
        return self.encoder.grid or self.data.resolution // 16

    @property
    def uses_disc(self) -> bool:
        return self.vae.train and self.loss.reg.gan > 0

    def sit_shape(self) -> dict[str, int]:
        """hidden_size, depth, num_heads and patch_size: those of `size`, overridden where given."""
        sit, names = self.sit, ("hidden_size", "depth", "num_heads", "patch_size")
        own = zip(names, (sit.hidden_size, sit.depth, sit.num_heads, sit.patch_size))
        return SIZES[sit.size] | {name: value for name, value in own if value is not None}


def all_settings(section: Any, prefix: str = "") -> Iterator[tuple[str, Field, Any]]:
    """(full name such as "loss.reg.kl", declaration, value) of every setting below `section`."""
    for declared in fields(section):
        value, name = getattr(section, declared.name), f"{prefix}{declared.name}"
        if is_dataclass(value):
            yield from all_settings(value, f"{name}.")
        else:
            yield name, declared, value


def per_rank_batch(config: Config, ranks: int) -> int:
    """Images of one rank in one optimizer step; `UserError` if the batch does not split evenly."""
    size, shares = config.run.batch_size, ranks * config.run.accumulation
    if size % shares:
        raise UserError(
            f"run.batch_size={size} does not split into {ranks} ranks x {config.run.accumulation} "
            f"micro-batches: make it a multiple of {shares}"
        )
    return size // ranks
