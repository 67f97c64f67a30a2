"""What cannot train: values and combinations of settings, each with what to change."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from models.sit import SIZES

if TYPE_CHECKING:  # utils.config asks here before it hands out a Config
    from utils.config import Config

AT_LEAST_ONE = (
    *("run.steps", "run.batch_size", "run.accumulation", "run.log_every", "run.save_every"),
    *("run.keep_last", "data.resolution", "latent_norm.stats_images", "preview.num"),
    *("eval.num", "eval.batch_size", "disc.layers", "disc.channels"),
)


def faults(c: "Config") -> Iterator[tuple[bool, str]]:
    """(is it so?, what to say) of every combination that cannot train, whatever the data."""
    for part in (_value_faults, _network_faults, _loss_faults):
        yield from part(c)


def _value_faults(c: "Config"):
    """(is it so?, what to say) of single values."""
    for name in AT_LEAST_ONE:
        section, key = name.split(".")
        value = getattr(getattr(c, section), key)
        yield value < 1, f"{name}={value} must be at least 1"
    for name, part in (("preview", c.preview), ("eval", c.eval)):
        least = 2 if part.solver == "sde" else 1
        yield part.steps < least, f"{name}.steps={part.steps} must be at least {least}"
    yield c.data.workers < 0, f"data.workers={c.data.workers} must not be negative"
    yield not 0 <= c.ema.decay < 1, f"ema.decay={c.ema.decay} must lie in [0, 1)"
    known = {"fid", "sfid", "is", "precision", "recall"}
    unknown = set(c.eval.metrics) - known
    yield unknown, f"eval.metrics: {', '.join(unknown)} unknown, choose from {', '.join(known)}"
    yield (
        not set(c.run.trackers) <= {"tensorboard", "wandb"},
        f"run.trackers={c.run.trackers}: choose from tensorboard, wandb",
    )
    absent = [name for name in c.run.trackers if find_spec(name) is None]
    yield absent, f"run.trackers: {', '.join(absent)} is not installed: pip install it"
    origin = c.run.init_from
    yield (
        origin is not None and not (Path(origin) / "sit" / "config.json").is_file(),
        f"run.init_from={origin} is no checkpoint folder: it has no sit/config.json",
    )


def _network_faults(c: "Config"):
    """The same of SiT, VAE and discriminator."""
    yield c.sit.size not in SIZES, f"sit.size={c.sit.size}: choose one of {', '.join(SIZES)}"
    shape = c.sit_shape()
    yield min(shape.values()) < 1, f"sit: {shape} must all be at least 1"
    yield (
        shape["hidden_size"] % (4 * shape["num_heads"]) != 0,
        f"sit.hidden_size={shape['hidden_size']} must be a multiple of "
        f"4 x sit.num_heads={shape['num_heads']}: change one",
    )
    drop = c.sit.class_dropout_prob
    yield not 0 <= drop < 1, f"sit.class_dropout_prob={drop} must lie in [0, 1)"
    for name, part in (("preview", c.preview), ("eval", c.eval)):
        yield (
            part.every > 0 and part.cfg_scale != 1 and drop == 0,
            f"{name}.cfg_scale={part.cfg_scale} needs a null label, and "
            f"sit.class_dropout_prob=0 builds none: set {name}.cfg_scale=1",
        )
    yield (
        c.vae.weights is None and not c.vae.train,
        "vae.weights=null with vae.train=false would train on the latents of random weights: "
        "set vae.weights, or vae.train=true",
    )
    yield (
        c.disc.norm == "group" and c.disc.channels % 8 != 0,
        f"disc.norm=group makes groups of 8 channels, and disc.channels={c.disc.channels} is no "
        "multiple of 8: change one",
    )


def _loss_faults(c: "Config"):
    """The same of the losses and of the encoders they need."""
    align, enc, depth = c.loss.align, c.encoder, c.sit_shape()["depth"]
    yield (
        c.data.latents is not None and c.vae.train,
        f"data.latents={c.data.latents} are of a VAE that stands still: set vae.train=false, or "
        "data.latents=null",
    )
    yield (
        enc.cached and c.data.latents is None,
        "encoder.cached=true reads the tokens that lie in data.latents: set it, or "
        "encoder.cached=false",
    )
    yield (
        align.sit > 0 and not enc.names,
        f"loss.align.sit={align.sit} needs an encoder: name one in encoder.names, or set "
        "loss.align.sit=0 loss.align.vae=0",
    )
    yield (
        len(enc.weights) not in (0, len(enc.names)),
        f"encoder.weights has {len(enc.weights)} entries for {len(enc.names)} encoder.names: "
        "give one (or null) for each, or []",
    )
    yield (
        align.sit == 0 and align.vae > 0 and c.vae.train,
        f"loss.align.vae={align.vae} goes through a projector that loss.align.sit=0 never trains: "
        "set loss.align.vae=0 too, or vae.train=false",
    )
    yield (
        c.uses_encoder and not 1 <= align.depth <= depth,
        f"loss.align.depth={align.depth} must lie in 1..{depth}, the blocks of the SiT",
    )
    yield (
        c.loss.diffusion.to_vae and not c.vae.train,
        "loss.diffusion.to_vae=true needs a VAE that trains: set vae.train=true",
    )
    for name, value in (
        ("loss.reg.gan_start", c.loss.reg.gan_start),
        ("disc.alone_steps", c.disc.alone_steps),
    ):
        yield value < 0, f"{name}={value} must not be negative"
    yield (
        c.disc.alone_steps > 0 and not c.uses_disc,
        f"disc.alone_steps={c.disc.alone_steps}, but no discriminator trains: set vae.train=true "
        "and loss.reg.gan above 0, or disc.alone_steps=0",
    )
    yield (
        c.disc.alone_steps >= c.run.steps,
        f"disc.alone_steps={c.disc.alone_steps} of run.steps={c.run.steps} leave none for VAE and "
        "SiT: lower the first, or raise the second",
    )
