"""The networks of a run: one record, and how it is built, loaded and made ready to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loss.gan import LeCam
from models.checks.errors import UserError
from models.discriminator import PatchGAN
from models.encoders import Encoder, encoder_on_meta, load_encoder
from models.lpips import (
    PerceptualNet,
    halve,
    load_lpips,
    load_perceptual_net,
    split_perceptual,
)
from models.sit import SiT
from models.vae import VAE, build_vae, load_vae
from models.weights.loading import load_strictly
from models.weights.published import WeightFile
from models.weights.reading import read_state
from utils import checkpoint as ckpt
from utils.compilation import compile_network
from utils.config.schema import Config
from utils.data.base import Source
from utils.data.latent_stats import measure_latents
from utils.data.latents import LatentCache
from utils.distributed import Ranks
from utils.evaluation.networks import read_classifier_facts
from utils.precision import (
    autocast,
    cast_weights,
    effective_precision,
    emulation_note,
    to_channels_last,
)
from utils.random import generator
from utils.training.ema import EmaUpdate, make_ema
from utils.training.starting.inheritance import Inheritance, inherit
from utils.training.trained_network import TrainedNetwork

if TYPE_CHECKING:
    from accelerate import Accelerator
    from lpips import LPIPS


@dataclass
class Networks:
    """All networks of a run, raw. `trained` holds what trains the ones that train, by the names
    vae, sit, disc; `update_ema` moves `ema` towards `sit`."""

    vae: VAE
    sit: SiT
    disc: PatchGAN | None = None
    encoders: list[Encoder] = field(default_factory=list)
    lpips: LPIPS | None = None
    perceptual: PerceptualNet | None = None
    lecam: LeCam | None = None
    ema: SiT = field(init=False)
    update_ema: EmaUpdate = field(init=False)
    trained: dict[str, TrainedNetwork] = field(default_factory=dict)
    precision: str = "fp32"  # of the forward passes; run.precision where the device has it
    channels_last: bool = False  # whether convolutions work on NHWC memory
    cuda_graphs: bool = False  # whether what networks return lasts for one step alone

    def autocast(self) -> torch.autocast:
        """Mixed precision, for forwards only."""
        return autocast(self.sit.device, self.precision)

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """Every tensor of the state of a run, by what it belongs to, in words."""
        nets = {"VAE": self.vae, "SiT": self.sit, "EMA": self.ema, "discriminator": self.disc}
        nets["LeCam averages"] = self.lecam
        found = {name: [*n.parameters(), *n.buffers()] for name, n in nets.items() if n is not None}
        for name, trained in self.trained.items():
            state = trained.opt.state.values()
            found[f"optimizer of {name}"] = [t for moments in state for t in moments.values()]
        return found


def build_networks(
    config: Config,
    source: Source,
    accelerator: Accelerator,
    checkpoint: Path | None = None,
    cache: LatentCache | None = None,
) -> tuple[Networks, dict | None]:
    """Networks at their start, or as `checkpoint` holds them, ready to train; and of a run that
    starts without a checkpoint the latent statistics it starts with (`initial_latent_stats`).

    `run.init_from` gives a new run the weights of a checkpoint as far as they fit, but neither its
    step nor its optimizers. `cache`: the latents that the run reads instead of running the VAE.
    """
    c, device = config, accelerator.device
    origin = checkpoint or (Path(c.run.init_from) if c.run.init_from else None)
    # the main process downloads, the others read its cache
    vae, encoders, lpips = Ranks().main_first(lambda: load_pretrained(c, origin))
    perceptual = Ranks().main_first(lambda: load_perceptual(c))
    vae = vae.to(device)
    if cache:
        cache.check_vae(vae, vae_spec(c, origin)[0])
    own_disc = uses_disc_weights(c, origin)
    file = c.disc.weights if own_disc else None
    disc = _seeded(c, "disc", lambda: build_disc(c, file)).to(device) if c.uses_disc else None
    dims = tuple(encoder.embed_dim for encoder in encoders)
    if c.uses_encoder and c.encoder.cached:
        assert cache, "encoder.cached needs data.latents"
        dims = cache.encoder_dims()
    about, inherited = (c, vae, source.num_classes, dims, device), None
    if origin and not checkpoint:
        inherited = inherit(c, origin, meta_sit(*about[:4]), disc, source.classes)
    sit = load_or_initialize_sit(*about, origin, inherited=inherited)
    stats = None
    if origin is None:
        stats = initial_latent_stats(c, vae, source, cache)
        sit.bn.set_stats(torch.tensor(stats["mean"]), torch.tensor(stats["std"]))
    elif disc:
        is_there = inherited is None or inherited.parts["disc"].carried
        if is_there and not ckpt.load_discriminator_weights(disc, origin):
            raise UserError(f"{origin} has no discriminator: set loss.reg.gan=0, or a new run.name")
    nets = Networks(vae, sit, disc, encoders=[encoder.to(device) for encoder in encoders])
    nets.lpips = lpips.to(device) if lpips else None
    nets.perceptual = perceptual.to(device) if perceptual else None
    nets.lecam = LeCam().to(device) if disc and c.loss.reg.lecam else None
    nets.precision = effective_precision(c.run.precision, device)
    if note := emulation_note(c.run.precision, device):
        Ranks().print(f"run.precision={c.run.precision}: {note}")
    prepare_for_training(nets, c, accelerator)
    if c.run.shard_optimizer and not nets.trained["sit"].shares:
        Ranks().print("run.shard_optimizer changes nothing: a single process keeps the whole state")
    if origin is None:
        nets.ema = make_ema(sit)
    elif inherited and inherited.sit_changes:
        nets.ema = make_ema(sit)  # what is new is the same in both
        inherited.load_sit(nets.ema, ckpt.SIT_EMA)
    else:
        nets.ema = load_or_initialize_sit(*about, origin, ckpt.SIT_EMA).eval().requires_grad_(False)
    nets.update_ema = EmaUpdate(nets.ema, sit, nets.trained["sit"].shares)
    if c.run.compile:
        compile_network(nets.ema)
    if checkpoint is not None:
        ckpt.restore_training_state(nets, checkpoint)
    for trained in nets.trained.values():
        if trained.guard:
            trained.guard.remember()  # what a checkpoint has just brought
    return nets, stats


def restore_networks(nets: Networks, checkpoint: Path) -> None:
    """Bring the networks of a run back, in place, to what they were at one of its checkpoints."""
    vae = load_vae(str(checkpoint / ckpt.VAE_FOLDER))
    nets.vae.load_state_dict(vae.state_dict())
    ckpt.load_sit_weights(nets.sit, checkpoint, ckpt.SIT)
    with nets.update_ema.whole():
        ckpt.load_sit_weights(nets.ema, checkpoint, ckpt.SIT_EMA)
    if nets.disc:
        ckpt.load_discriminator_weights(nets.disc, checkpoint)
    ckpt.restore_training_state(nets, checkpoint)


def load_pretrained(c: Config, origin: Path | None) -> tuple[VAE, list[Encoder], LPIPS | None]:
    """VAE, encoders and LPIPS, on the CPU; the VAE is that of `origin`, if there is one."""
    lpips = load_lpips(c.loss.reg.lpips_weights) if c.vae.train and c.loss.reg.lpips else None
    vae = _seeded(c, "vae", lambda: load_vae(*vae_spec(c, origin)))
    return vae, _seeded(c, "encoders", lambda: load_encoders(c)), lpips


def load_perceptual(c: Config, spec: str | None = None) -> PerceptualNet | None:
    """The network of the perceptual loss, None without such a loss. It is fed at the size that
    scripts/train_classifier.py states in its file, other networks at that of the images. `spec`:
    another one than the config's, for the same size."""
    reg = c.loss.reg
    if not (c.vae.train and reg.perceptual and reg.perceptual_net):
        return None
    _, file = split_perceptual(reg.perceptual_net)
    facts = read_classifier_facts(Path(file)) if file else None
    net, size = spec or reg.perceptual_net, facts.size if facts else None
    return _seeded(c, "perceptual", lambda: load_perceptual_net(net, c.data.resolution, size))


def vae_spec(c: Config, origin: Path | None) -> tuple[str, str | None]:
    """Name and weights of the VAE that the run begins with, for `load_vae`."""
    return (str(origin / ckpt.VAE_FOLDER), "hub") if origin else (c.vae.name, c.vae.weights)


def load_encoders(c: Config) -> list[Encoder]:
    """The frozen encoders of the alignment loss; none where nothing is aligned or all is cached."""
    if not c.uses_encoder or c.encoder.cached:
        return []
    files = c.encoder.weights or [None] * len(c.encoder.names)
    pairs = zip(c.encoder.names, files)
    return [load_encoder(name, file, c.data.resolution, c.encoder_grid) for name, file in pairs]


def uses_disc_weights(c: Config, origin: Path | None) -> bool:
    """Whether a run that begins with the checkpoint `origin` reads the file `disc.weights`: a new
    run does, also one with `run.init_from`; one that goes on has the checkpoint's."""
    return c.disc.weights is not None and (origin is None or origin == Path(c.run.init_from or ""))


def build_disc(c: Config, weights: str | None) -> PatchGAN:
    """The discriminator, with the weights of a file if one is given."""
    PatchGAN.check_resolution(c.disc.layers, c.data.resolution)  # before a million layers are made
    disc = PatchGAN(c.disc.layers, c.disc.channels, c.disc.norm)
    if weights:
        what = "a discriminator's weights"
        path = WeightFile(what, path=Path(weights), setting="disc.weights={}").fetch(download=False)
        what = "the discriminator of this config"
        state = read_state(path, known=("main.0.weight",), prefer=("discriminator",), what=what)
        load_strictly(disc, state, path, what)
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


def load_or_initialize_sit(
    c: Config,
    vae: VAE,
    num_classes: int,
    dims: tuple[int, ...],
    device: torch.device,
    origin: Path | None,
    name: str = ckpt.SIT,
    inherited: Inheritance | None = None,
) -> SiT:
    """The SiT of this config on `device`: random; or with the weights `name` (SIT or SIT_EMA) of
    `origin`, which are then the only ones in memory; or random but for what is `inherited`."""
    if origin is None or (inherited and inherited.sit_changes):
        sit = _seeded(c, "sit", lambda: build_sit(c, vae, num_classes, dims)).to(device)
        if inherited:
            inherited.load_sit(sit, name)
        return sit
    # memory of its own: tensors taken from the file as they are would be mapped, and not aligned
    sit = meta_sit(c, vae, num_classes, dims).to_empty(device=device)
    ckpt.load_sit_weights(sit, origin, name)
    return sit


def meta_sit(c: Config, vae: VAE, num_classes: int, dims: tuple[int, ...]) -> SiT:
    """The SiT of this config on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return build_sit(c, vae, num_classes, dims)


def skeleton(c: Config, num_classes: int, origin: Path | None = None) -> Networks:
    """The networks of a run, without LPIPS, on the meta device: shapes without numbers. The VAE is
    that of the checkpoint `origin`, if there is one.

    Raises `UserError` where shapes do not meet. No weight file is looked for.
    """
    with torch.device("meta"):
        vae = build_vae(str(origin / ckpt.VAE_FOLDER) if origin else c.vae.name)
        names = c.encoder.names if c.uses_encoder else []
        encoders = [encoder_on_meta(n, c.data.resolution, c.encoder_grid) for n in names]
        sit = build_sit(c, vae, num_classes, tuple(e.embed_dim for e in encoders))
        disc = build_disc(c, None) if c.uses_disc else None
    nets = Networks(vae, sit, disc, [] if c.encoder.cached else encoders)
    nets.ema = make_ema(sit)
    nets.lecam = LeCam() if disc and c.loss.reg.lecam else None
    if c.loss.reg.perceptual_net:
        name, _ = split_perceptual(c.loss.reg.perceptual_net)
        with torch.device("meta"):
            nets.perceptual = load_perceptual(c, f"{name}@random")
    nets.precision = c.run.precision
    return nets


def initial_latent_stats(c: Config, vae: VAE, source: Source, cache: LatentCache | None) -> dict:
    """{"origin", "mean", "std"}, per channel: those of the cache, those in the VAE's config, or
    measured now on `latent_norm.stats_images` images; the latent norm starts with them."""
    known = vae.latent_stats()
    if cache:
        origin, stats = f"cached latents {cache.folder}", cache.stats()
    elif known:
        origin, stats = f"config of the starting VAE {c.vae.name}", known
    else:
        num, ranks = min(c.latent_norm.stats_images, len(source)), Ranks()
        origin = f"measured on {num} images of the data"
        stats = measure_latents(vae, source, num, c.run.seed, ranks)
    return {"origin": origin} | dict(zip(("mean", "std"), (v.tolist() for v in stats)))


def prepare_for_training(nets: Networks, c: Config, accelerator: Accelerator) -> None:
    """Memory format, checkpointing, compilation, and a `TrainedNetwork` for each that trains."""
    on_gpu = accelerator.device.type == "cuda"
    nets.channels_last = on_gpu if c.run.channels_last is None else c.run.channels_last
    for encoder in nets.encoders:
        cast_weights(encoder, nets.precision)
    halves = c.run.lpips_precision == "fp16" == effective_precision("fp16", accelerator.device)
    if nets.lpips and halves:
        halve(nets.lpips)
    if nets.channels_last:
        for net in filter(None, (nets.vae, nets.disc, nets.lpips, nets.perceptual)):
            to_channels_last(net)
    if c.run.checkpointing in ("sit", "both"):
        nets.sit.enable_gradient_checkpointing()
    if c.run.checkpointing in ("vae", "both"):
        nets.vae.enable_gradient_checkpointing()
    ranks = accelerator.num_processes
    nets.cuda_graphs = _uses_cuda_graphs(c, on_gpu, ranks)
    if c.run.compile:
        _compile(nets, c, ranks)
    nets.vae.eval()  # no dropout in it: train and eval mode are the same
    trained = {"vae": (nets.vae, c.vae.optim)} if c.vae.train else {}
    trained |= {"sit": (nets.sit, c.sit.optim)}
    trained |= {"disc": (nets.disc, c.disc.optim)} if nets.disc else {}
    for name, (net, optim) in trained.items():
        about = (accelerator, c.run.precision, c.run.shard_optimizer)
        nets.trained[name] = TrainedNetwork(net, optim, *about)
        if c.run.on_nonfinite == "skip":
            averages = [nets.lecam] if name == "disc" and nets.lecam else []
            nets.trained[name].skip_nonfinite(*averages)
    if not c.vae.train:
        nets.vae.requires_grad_(False)


def _compile(nets: Networks, c: Config, ranks: int) -> None:
    """All networks but the EMA, which does not exist yet; those that run between steps, and what
    waits for other ranks inside, without CUDA graphs."""
    compile_network(nets.vae, "encode", "decode", cuda_graphs=nets.cuda_graphs)
    for net in filter(None, (nets.sit, nets.lpips, nets.perceptual, *nets.encoders)):
        compile_network(net, cuda_graphs=nets.cuda_graphs)
    if nets.disc:
        alone = ranks == 1 or c.disc.norm != "batch"
        compile_network(nets.disc, cuda_graphs=nets.cuda_graphs and alone)


def _uses_cuda_graphs(c: Config, on_gpu: bool, ranks: int) -> bool:
    """Whether training replays CUDA graphs; where the setting asks for more, a line says so."""
    if c.run.compile_mode != "reduce-overhead":
        return False
    less = "run.compile_mode=reduce-overhead: "
    if not (c.run.compile and on_gpu):
        why = "there is no GPU" if c.run.compile else "run.compile=false"
        Ranks().print(f"{less}no CUDA graphs, as {why}")
        return False
    if c.uses_disc and ranks > 1 and c.disc.norm == "batch":
        Ranks().print(f"{less}no CUDA graphs of the discriminator, whose batch norm joins ranks")
    return True


def _seeded(c: Config, name: str, build: Callable):
    """Random initial weights that depend on (seed, name) alone, not on what was built before."""
    with _fork_seed(generator("init", c.run.seed, name).initial_seed()):
        return build()


@contextmanager
def _fork_seed(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
