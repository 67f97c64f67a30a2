"""From a configuration to networks: built, loaded, wrapped; and what a run will be."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
from accelerate import Accelerator
from lpips import LPIPS
from safetensors.torch import load_file, save_file

from loss.reconstruction import LeCam, load_lpips
from models.discriminator import PatchGAN
from models.encoders import Encoder, encoder_shape, load_encoder
from models.errors import UserError
from models.sit import SiT
from models.vae import VAE, build_vae, load_vae
from models.vae_keys import read_state
from utils.config import Config, per_rank_batch
from utils.data import Source
from utils.draws import generator
from utils.ema import make_ema
from utils.latent_stats import measure_latents
from utils.latents import LatentCache
from utils.learner import DTYPES, Learner


@dataclass
class Nets:
    """All networks of a run, raw; `learn` holds what trains those that train: vae, sit, disc."""

    vae: VAE
    sit: SiT
    disc: PatchGAN | None = None
    encoders: list[Encoder] = field(default_factory=list)
    lpips: LPIPS | None = None
    lecam: LeCam | None = None
    ema: SiT | None = None
    learn: dict[str, Learner] = field(default_factory=dict)
    precision: str = "fp32"
    starting_stats: dict | None = (
        None  # of a new run: the latent norm's first ones, and their origin
    )

    def autocast(self) -> torch.autocast:
        """Mixed precision, for forwards only."""
        device, dtype = self.sit.device.type, DTYPES[self.precision]
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def build_nets(
    config: Config, source: Source, accelerator: Accelerator, checkpoint: Path | None = None
) -> Nets:
    """Networks at their start, or as `checkpoint` holds them; ready to train.

    `run.init_from` gives a new run the weights of a checkpoint, but neither its step nor its
    optimizers.
    """
    c, device = config, accelerator.device
    origin = checkpoint or (Path(c.run.init_from) if c.run.init_from else None)
    with accelerator.main_process_first():  # one process downloads, the others read its cache
        vae = _seeded(c, "vae", lambda: _load_vae(c, origin)).to(device)
        encoders = _seeded(c, "encoders", lambda: load_encoders(c, device))
        net = load_lpips(c.loss.reg.lpips_weights) if c.vae.train and c.loss.reg.lpips else None
    disc = _seeded(c, "disc", lambda: build_disc(c)).to(device) if c.uses_disc else None
    lecam = LeCam().to(device) if c.uses_disc and c.loss.reg.lecam else None
    cache = open_cache_of(vae, c, origin)
    dims = tuple(encoder.embed_dim for encoder in encoders)
    if c.uses_encoder and c.encoder.cached:
        dims = cache.encoder_dims()
    sit = _seeded(c, "sit", lambda: build_sit(c, vae, source.num_classes, dims)).to(device)
    start = None
    if origin is None:
        start = starting_stats(vae, source, c, accelerator, cache)
        sit.bn.set_stats(torch.tensor(start["mean"]), torch.tensor(start["std"]))
    net = net.to(device) if net else None
    nets = Nets(
        vae, sit, disc, encoders, net, lecam, precision=c.run.precision, starting_stats=start
    )
    if origin is not None:
        load_weights(nets, origin, goes_on=checkpoint is not None)
    set_up(nets, c, accelerator)
    nets.ema = make_ema(sit)
    if origin is not None:
        _load_strictly(nets.ema, SiT.from_pretrained(origin / "sit_ema").state_dict(), "sit_ema")
    if checkpoint is not None:
        load_optimizers(nets, checkpoint)
    return nets


def set_up(nets: Nets, c: Config, accelerator: Accelerator) -> None:
    """Memory format, checkpointing, compilation, and a learner for each network that trains."""
    if c.run.channels_last:
        for net in filter(None, (nets.vae, nets.disc, nets.lpips)):
            _to_channels_last(net)
    if c.run.gradient_checkpointing:
        nets.sit.enable_gradient_checkpointing()
        nets.vae.enable_gradient_checkpointing()
    if c.run.compile:
        for net in filter(None, (nets.vae, nets.sit, nets.disc)):
            net.compile()
        if not c.vae.train:  # a frozen VAE is called by its encoder alone
            nets.vae.encode = torch.compile(nets.vae.encode)
    nets.vae.eval()  # no dropout in it: train and eval mode are the same
    trained = {"vae": (nets.vae, c.vae.optim)} if c.vae.train else {}
    trained |= {"sit": (nets.sit, c.sit.optim)}
    trained |= {"disc": (nets.disc, c.disc.optim)} if nets.disc else {}
    for name, (net, optim) in trained.items():
        nets.learn[name] = Learner(net, optim, accelerator, c.run.precision)
    if not c.vae.train:
        nets.vae.requires_grad_(False)


def _to_channels_last(net: nn.Module) -> None:
    """Layer by layer: Qwen's VAE has 3-D convolutions too, which a blanket conversion refuses."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def _load_vae(c: Config, origin: Path | None) -> VAE:
    return load_vae(str(origin / "vae")) if origin else load_vae(c.vae.name, c.vae.weights)


def load_encoders(c: Config, device: torch.device) -> list[Encoder]:
    """The frozen encoders of the alignment loss; none where nothing is aligned or all is cached."""
    if not c.uses_encoder or c.encoder.cached:
        return []
    files = c.encoder.weights or [None] * len(c.encoder.names)
    grid = c.encoder_grid
    return [
        load_encoder(name, file, c.data.resolution, grid).to(device)
        for name, file in zip(c.encoder.names, files)
    ]


def build_disc(c: Config) -> PatchGAN:
    """The discriminator, from its file if one is given."""
    disc = PatchGAN(c.disc.layers, c.disc.channels, c.disc.norm)
    disc.check_resolution(c.data.resolution)
    if c.disc.weights:
        path = Path(c.disc.weights)
        if not path.is_file():
            raise UserError(f"disc.weights={path}: no such file")
        _load_strictly(disc, read_state(path), str(path))
    return disc


def build_sit(c: Config, vae: VAE, num_classes: int, encoder_dims: tuple[int, ...]) -> SiT:
    """A SiT that fits the latents of `vae`; `UserError` where shapes do not meet."""
    channels, height, _ = vae.latent_shape(c.data.resolution)
    shape = c.sit_shape()
    if height % shape["patch_size"]:
        raise UserError(
            f"patch size {shape['patch_size']} does not divide the {height}x{height} latents of "
            f"{c.vae.name} at {c.data.resolution} px: choose another sit.size or sit.patch_size"
        )
    grid = height // shape["patch_size"]
    if encoder_dims and c.encoder_grid != grid:
        raise UserError(
            f"the SiT has {grid}x{grid} tokens, the encoder {c.encoder_grid}x{c.encoder_grid}: "
            f"choose another sit.size, or set encoder.grid={grid}"
        )
    return SiT(
        input_size=height,
        in_channels=channels,
        num_classes=num_classes,
        class_dropout_prob=c.sit.class_dropout_prob,
        encoder_dims=encoder_dims,
        align_depth=c.loss.align.depth,
        projector=c.sit.projector,
        projector_dim=c.sit.projector_dim,
        qk_norm=c.sit.qk_norm,
        latent_norm="batch" if c.latent_norm.enabled and c.vae.train else "fixed",
        **shape,
    )


def open_cache_of(vae: VAE, c: Config, origin: Path | None) -> LatentCache | None:
    """The cached latents of the config; `UserError` if another VAE made them."""
    if not c.data.latents:
        return None
    cache = LatentCache(Path(c.data.latents))
    cache.check_vae(vae, str(origin / "vae") if origin else c.vae.name)
    return cache


def starting_stats(
    vae: VAE, source: Source, c: Config, accelerator: Accelerator, cache: LatentCache | None
) -> dict:
    """{"origin", "mean", "std"} per channel: of the cache, of the VAE's config, or measured now."""
    known = vae.latent_stats()
    if cache:
        origin, stats = f"cached latents {cache.folder}", cache.stats()
    elif known:
        origin, stats = f"config of the starting VAE {c.vae.name}", known
    else:
        num = min(c.latent_norm.stats_images, len(source))
        origin = f"measured on {num} images of the data"
        stats = measure_latents(
            vae,
            source,
            num,
            c.run.seed,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            sum_over_ranks=lambda sums: accelerator.reduce(sums, "sum"),
        )
    return {"origin": origin} | dict(zip(("mean", "std"), (v.tolist() for v in stats)))


def save_nets(nets: Nets, folder: Path) -> None:
    """The networks' part of a checkpoint: vae/ sit/ sit_ema/ discriminator.safetensors optim.pt."""
    mean, std = nets.ema.bn.stats()
    nets.vae.save(folder / "vae", mean, std)
    nets.sit.save_pretrained(folder / "sit")
    nets.ema.save_pretrained(folder / "sit_ema")
    if nets.disc:
        # channels-last weights are not contiguous, which safetensors refuses
        state = {name: value.contiguous() for name, value in nets.disc.state_dict().items()}
        save_file(state, folder / "discriminator.safetensors")
    optim = {name: learner.state_dict() for name, learner in nets.learn.items()}
    optim |= {"lecam": nets.lecam.state_dict()} if nets.lecam else {}
    torch.save(optim, folder / "optim.pt")


def load_weights(nets: Nets, folder: Path, goes_on: bool) -> None:
    """Raw SiT and discriminator of a checkpoint (its VAE was loaded when it was built). A new run
    may have a discriminator where the checkpoint that it starts from has none."""
    _load_strictly(nets.sit, SiT.from_pretrained(folder / "sit").state_dict(), "sit")
    if nets.disc:
        path = folder / "discriminator.safetensors"
        if path.is_file():
            _load_strictly(nets.disc, load_file(path), "discriminator")
        elif goes_on:
            raise UserError(f"{folder} has no discriminator: set loss.reg.gan=0, or a new run.name")


def load_optimizers(nets: Nets, folder: Path) -> None:
    """Moments, loss scales and LeCam averages of a checkpoint."""
    if not (folder / "optim.pt").is_file():
        raise UserError(f"{folder} holds no optimizers (imported?): use run.init_from={folder}")
    state = torch.load(folder / "optim.pt", map_location="cpu", weights_only=True, mmap=True)
    missing = set(nets.learn) - set(state)
    if missing:
        raise UserError(f"{folder} has no optimizer state of {', '.join(missing)}: start a new run")
    for name, learner in nets.learn.items():
        learner.load_state_dict(state[name])
    if nets.lecam and "lecam" in state:
        nets.lecam.load_state_dict(state["lecam"])


def _load_strictly(net: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    try:
        net.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"{what} does not fit the network of this config: {error}") from None


def _seeded(c: Config, name: str, build):
    """Random initial weights that depend on (seed, name) alone, not on what was built before."""
    with _fork_seed(generator("init", c.run.seed, name).initial_seed()):
        return build()


@contextmanager
def _fork_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def describe(c: Config, source: Source | None, ranks: int) -> dict[str, str]:
    """What a run will be, before anything is loaded: tokens, parameters, steps per epoch."""
    with torch.device("meta"):
        vae = build_vae(c.vae.name)
        shapes = [encoder_shape(n, c.data.resolution, c.encoder_grid) for n in c.encoder.names]
        dims = tuple(dim for _, dim in shapes) if c.uses_encoder else ()
        classes = source.num_classes if source else c.data.num_classes or 1000
        sit = build_sit(c, vae, classes, dims)
        disc = build_disc(c) if c.uses_disc else None
    rank_batch = per_rank_batch(c, ranks)
    latent = "x".join(map(str, vae.latent_shape(c.data.resolution)))
    epoch = (
        f"{len(source) // c.run.batch_size:,}" if source else f"unknown: no data at {c.data.path}"
    )
    backbone = count(sit) - count(sit.projectors)
    return {
        "global batch": f"{c.run.batch_size} = {rank_batch // c.run.accumulation} per rank x "
        f"{ranks} rank(s) x {c.run.accumulation} micro-batch(es)",
        "steps per epoch": epoch,
        "steps": f"{c.run.steps:,} ({c.run.steps * c.run.batch_size:,} images)",
        "classes": str(classes) + ("" if source else " (assumed: data not found)"),
        "latents": latent,
        "tokens": f"{sit.grid}x{sit.grid} = {sit.grid**2}",
        "encoders": ", ".join(c.encoder.names) if c.uses_encoder else "none",
        "parameters": f"SiT {backbone:,} + projectors {count(sit.projectors):,}, "
        f"VAE {count(vae):,}" + (f", discriminator {count(disc):,}" if disc else ""),
        "trained": ", ".join(["VAE"] * c.vae.train + ["SiT"] + ["discriminator"] * c.uses_disc),
        "images/s": "unknown until measured",
    }


def count(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())
