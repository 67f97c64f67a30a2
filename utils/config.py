"""The configuration of a run: nested dataclasses, YAML files of differences, `key=value`.

Every field says its unit and meaning. An unknown key, a wrong type or a combination that cannot
train ends in one line (`UserError`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.errors import UserError
from models.sit import SIZES
from utils.config_faults import faults


@dataclass
class Optim:
    """AdamW of one network."""

    lr: float = (
        1e-4  # constant after the warm-up; 2e-5 for the VAE when it starts from FLUX, SD3.5 or Qwen
    )
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm of this network alone; 0 = no clipping
    warmup_steps: int = 0  # optimizer steps of linear learning-rate warm-up


@dataclass
class Run:
    """One run, its machine, and what it leaves behind."""

    name: str = "repae"  # everything goes to OUT/NAME
    out: str = "exps"  # parent folder of all runs
    seed: int = 0  # weights, data order, and every random draw
    steps: int = 400_000  # optimizer steps; 400K x 256 = 80 epochs of ImageNet
    batch_size: int = 256  # images per optimizer step, over all ranks and micro-batches
    accumulation: int = 1  # micro-batches per optimizer step
    precision: Literal["bf16", "fp16", "fp32"] = (
        "bf16"  # autocast around forwards; weights are fp32
    )
    tf32: bool = True  # TF32 in what is left in float32, on GPUs that have it
    compile: bool = False  # torch.compile the SiT, the VAE and the discriminator
    gradient_checkpointing: bool = (
        False  # recompute activations of SiT and VAE: less memory, slower
    )
    channels_last: bool = False  # NHWC convolutions in VAE, discriminator and LPIPS
    resume: str = (
        "auto"  # auto = newest whole checkpoint of this run; never; or a checkpoint folder
    )
    init_from: str | None = None  # checkpoint folder whose weights a new run starts with
    log_every: int = 100  # steps between log lines (means over the steps in between)
    save_every: int = 10_000  # steps between checkpoints
    keep_last: int = 3  # newest checkpoints kept
    milestone_every: int = (
        100_000  # steps; checkpoints at its multiples are kept for ever; 0 = none
    )
    trackers: list[str] = field(
        default_factory=lambda: ["tensorboard"]
    )  # tensorboard, wandb; [] = none


@dataclass
class Data:
    """Training images."""

    source: str = "packed"  # packed, folder, hdf5, digits, synthetic
    path: str | None = None  # folder of the source; digits and synthetic need none
    latents: str | None = None  # folder of scripts/cache_latents.py: no VAE forward; VAE frozen
    split: str = "all"  # digits only: train, test, all
    resolution: int = 256  # pixels
    num_classes: int | None = None  # expected number; null = whatever the data has
    hflip: bool = False  # flip half of the images; the published recipe does not
    workers: int = 8  # loader processes per rank


@dataclass
class Vae:
    """The autoencoder."""

    name: str = "sdvae"  # short name, hub id, folder or CompVis .pt (models/vae.py)
    weights: str | None = "hub"  # hub = the published ones; a folder or file; null = from scratch
    train: bool = True  # false = frozen: REPA, or plain SiT
    optim: Optim = field(default_factory=Optim)


@dataclass
class Sit:
    """The diffusion transformer. The four null fields override those of `size`."""

    size: str = "SiT-XL/2"  # SiT-{S,B,L,XL}/{1,2,4,8}
    depth: int | None = None  # blocks
    hidden_size: int | None = None  # width D
    num_heads: int | None = None
    patch_size: int | None = None  # latent pixels
    qk_norm: bool = False
    class_dropout_prob: float = 0.1  # share of labels replaced by the null label; 0 = no guidance
    projector: Literal["mlp", "conv"] = "mlp"  # conv = iREPA's
    projector_dim: int = 2048  # hidden width of the mlp projector
    optim: Optim = field(default_factory=Optim)


@dataclass
class Disc:
    """The PatchGAN discriminator."""

    layers: int = 3  # stride-2 stages + 1
    channels: int = 64  # width of the first layer
    norm: Literal["batch", "group"] = "batch"  # group: accumulation equals the big batch exactly
    alone_steps: int = 0  # of run.steps, the first: it alone trains, on the starting VAE's pictures
    weights: str | None = None  # safetensors, or a published -discriminator-ckpt.pt; null = random
    optim: Optim = field(default_factory=Optim)


@dataclass
class LatentNorm:
    """Batch norm between VAE and SiT."""

    enabled: bool = True  # false = statistics of the starting VAE, never updated
    stats_images: int = 4096  # images that measure them when the starting VAE brings none


@dataclass
class Encoder:
    """Frozen encoders to align with."""

    names: list[str] = field(
        default_factory=lambda: ["dinov2-b"]
    )  # models/encoders.py, or timm:NAME
    weights: list[str | None] = field(default_factory=list)  # a file for each name; [] = published
    grid: int | None = None  # tokens per side; null = resolution / 16
    cached: bool = False  # true = their tokens lie in data.latents, too: no encoder is loaded


@dataclass
class Diffusion:
    """L_DIFF."""

    path: Literal["linear", "cosine"] = "linear"  # interpolant
    time: Literal["uniform", "lognormal"] = "uniform"  # distribution of t
    to_vae: bool = False  # true = naive end-to-end: L_DIFF reaches the VAE too, and collapses it


@dataclass
class Align:
    """L_REPA; both weights 0 = no encoder is loaded at all."""

    sit: float = 0.5  # weight in the SiT phase
    vae: float = 1.5  # weight in the VAE phase
    depth: int = 8  # SiT block (1-based) whose output is aligned
    spatial_norm: float = 0.0  # iREPA: 0.6; 0 = features as they are


@dataclass
class Reg:
    """L_REG of the VAE; a weight of 0 leaves the term out and loads nothing for it."""

    pixel: float = 1.0  # per-pixel mean
    pixel_kind: Literal["l1", "mse"] = "l1"  # l1 as trained; the paper's text says mse
    lpips: float = 1.0  # VGG-16
    lpips_weights: str | None = None  # torchvision vgg16 file; null = torch hub cache
    lpips_double_scaling: bool = False  # true = VGG sees [-3, 1], as in the published runs
    kl: float = 1e-6  # summed over the latent, mean over images
    gan: float = 0.1  # fixed weight of the generator term; 0 = no discriminator
    gan_start: int = 0  # step after disc.alone_steps from which the VAE sees it; it trains from 0
    lecam: float = 0.0  # LeCam regularisation of the discriminator


@dataclass
class Loss:
    """Weights and kinds of all terms."""

    diffusion: Diffusion = field(default_factory=Diffusion)
    align: Align = field(default_factory=Align)
    reg: Reg = field(default_factory=Reg)


@dataclass
class Ema:
    """Moving average of the SiT, latent-norm statistics included."""

    decay: float = 0.9999  # per optimizer step
    warmup: bool = False  # true = min(decay, (1 + step) / (10 + step)): for short runs


@dataclass
class Preview:
    """Pictures during training: samples of the EMA weights and reconstructions."""

    every: int = 10_000  # steps; 0 = none
    num: int = 64  # images; their noises and labels never change
    solver: Literal["ode-euler", "ode-heun", "ode-ab2", "sde"] = "ode-ab2"
    steps: int = 50  # of the solver
    cfg_scale: float = 2.0


@dataclass
class Eval:
    """Small evaluations during training, on the EMA weights, as evaluate_fid.py measures."""

    every: int = 0  # steps; 0 = none
    num: int = 1000  # images; named in every number, since small sets give larger distances
    reference: str | None = None  # as evaluate_fid.py --reference; null = the training images
    features: str = "inception"  # inception, dinov2, timm:NAME[@FILE], pixel
    weights: str | None = None  # weight file of inception or dinov2
    metrics: list[str] = field(default_factory=lambda: ["fid"])  # fid, sfid, is, precision, recall
    batch_size: int = 50  # images per rank and network call
    solver: Literal["ode-euler", "ode-heun", "ode-ab2", "sde"] = "ode-ab2"
    steps: int = 50  # of the solver
    cfg_scale: float = 1.0  # 1 = no guidance


@dataclass
class Config:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    vae: Vae = field(default_factory=Vae)
    sit: Sit = field(default_factory=Sit)
    disc: Disc = field(default_factory=Disc)
    latent_norm: LatentNorm = field(default_factory=LatentNorm)
    encoder: Encoder = field(default_factory=Encoder)
    loss: Loss = field(default_factory=Loss)
    ema: Ema = field(default_factory=Ema)
    preview: Preview = field(default_factory=Preview)
    eval: Eval = field(default_factory=Eval)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.out) / self.run.name

    @property
    def uses_encoder(self) -> bool:
        return self.loss.align.sit > 0

    @property
    def encoder_grid(self) -> int:
        """Tokens per side."""
        return self.encoder.grid or self.data.resolution // 16

    @property
    def uses_disc(self) -> bool:
        return self.vae.train and self.loss.reg.gan > 0

    def sit_shape(self) -> dict[str, int]:
        """hidden_size, depth, num_heads, patch_size: those of `size`, each overridden if given."""
        own = {name: getattr(self.sit, name) for name in SIZES[self.sit.size]}
        return SIZES[self.sit.size] | {k: v for k, v in own.items() if v is not None}


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Defaults, then each file (after the file its `base:` names), then `key=value` pairs."""
    for word in overrides:
        if word.startswith("-") or "=" not in word:
            raise UserError(f"'{word}' is no override: write key=value, e.g. run.steps=1000")
    try:
        merged = OmegaConf.structured(Config)
        for path in files:
            merged = OmegaConf.merge(merged, *_with_bases(Path(path)))
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from None
    except yaml.YAMLError:
        raise UserError(f"config: cannot read one of {' '.join(overrides)} as YAML") from None
    for wrong, message in faults(config):
        if wrong:
            raise UserError(message)
    return config


def _with_bases(path: Path) -> list:
    """The file's settings after those of its bases. `base:` is relative to the file."""
    if not path.is_file():
        raise UserError(
            f"no config at {path}: see configs/ for those that come with the repository"
        )
    try:
        own = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    base = own.pop("base", None) if own else None
    return [*(_with_bases(path.parent / base) if base else []), own]


def _one_line(error: OmegaConfBaseException) -> str:
    first = str(error).splitlines()[0]
    near = get_close_matches(str(error.full_key), [f.name for f in fields(Config)], n=1)
    if near and "Did you mean" not in first and error.full_key not in near:
        first += f". Did you mean: '{near[0]}'?"
    return f"config: {first}" + (f" (at {error.full_key})" if error.full_key else "")


def to_yaml(config: Config) -> str:
    """Every field, also those at their defaults."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def flat(tree, prefix: str = "") -> dict:
    """Nested dictionaries => {"a.b.c": value}."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {k: v for name, part in tree.items() for k, v in flat(part, f"{prefix}{name}.").items()}


def per_rank_batch(config: Config, ranks: int) -> int:
    """Images of one rank in one optimizer step; `UserError` if the batch does not split."""
    parts = ranks * config.run.accumulation
    if config.run.batch_size % parts:
        raise UserError(
            f"run.batch_size={config.run.batch_size} does not split into {ranks} ranks x "
            f"{config.run.accumulation} micro-batches: make it a multiple of {parts}"
        )
    return config.run.batch_size // ranks
