"""Which settings are invalid: numbers out of range, and settings that cannot be used together.

Whether the shapes of the networks fit each other and the data is checked in utils/training/plan.py.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

from models.checks.file_kinds import what_is
from utils.cli import LONGEST_NAME
from utils.config.resuming import CLASSES, CONTENT, STARTING, is_in
from utils.config.schema import Config, all_settings
from utils.files import is_one_line
from utils.samplers import least_steps

TRACKERS = ("tensorboard", "wandb")


def config_errors(config: Config) -> list[str]:
    """Return one message for each invalid setting, in the order of the schema; [] = all is well.

    A message names the setting, its value and what to change. Settings are compared with each
    other only if each is valid by itself.
    """
    alone = [*_range_errors(config), *_value_errors(config)]
    return alone or [*_data_errors(config), *_network_errors(config), *_loss_errors(config)]


def _range_errors(config: Config) -> Iterator[str]:
    for name, declared, value in all_settings(config):
        allowed = declared.metadata.get("range")
        values = value if isinstance(value, list) else [] if value is None else [value]
        for each in values if allowed else []:
            if each not in allowed:
                yield f"{name}={each} must be {'' if isfinite(each) else 'finite, '}{allowed}"


def _value_errors(config: Config) -> Iterator[str]:
    """Names of what is not here, and values that are none for another reason than their range."""
    for name in config.run.trackers:
        if name not in TRACKERS:
            yield f"run.trackers: {name} is unknown, choose from {', '.join(TRACKERS)}"
        elif find_spec(name) is None:
            yield f"run.trackers: {name} is not installed: pip install {name}"
    names = [CLASSES, CONTENT, *(name for name, *_ in all_settings(config))]
    for name in config.run.allow_change:
        if name not in names:
            yield f"run.allow_change: no setting is called {name}; write names as vae.optim.lr"
        elif is_in(name, STARTING):
            yield f"run.allow_change: {name} has its effect at the start of a run alone: remove it"
    yield from _folder_errors(config)
    for name, section in (("preview", config.preview), ("eval", config.eval)):
        least = least_steps(section.solver)
        if 1 <= section.steps < least:  # less than 1 is out of range anyway
            yield f"{name}.steps={section.steps} must be at least {least} for {section.solver}"


def _folder_errors(config: Config) -> Iterator[str]:
    """A name that is no folder's, a file where a folder must be, an origin that is no checkpoint
    although it is needed."""
    run, name = config.run, config.run.name
    if "/" in name:
        yield f"run.name={name} must not contain '/': run.out is the folder that holds the runs"
    elif name in ("", ".", "..") or name != name.strip() or not is_one_line(name):
        yield f"run.name={name!r} must be a name for a folder, without blanks at its ends"
    elif len(name.encode()) > LONGEST_NAME:
        yield f"run.name={name[:40]}... is too long: at most {LONGEST_NAME} bytes"
    else:
        above = (config.run_dir.absolute(), *config.run_dir.absolute().parents)
        there = next(place for place in above if os.path.lexists(place))
        if not os.path.isdir(there):
            yield f"run.out={run.out}: {there} is no folder: choose another run.out"
        # a run that goes on does not read its origin again
        started = any((config.run_dir / "checkpoints").glob("[0-9]*"))
        origin = None if started or run.resume not in ("auto", "never") else run.init_from
        if origin is not None and not os.path.isfile(Path(origin) / "sit" / "config.json"):
            yield f"run.init_from={origin} is no checkpoint folder: {_other_origin(Path(origin))}"


def _other_origin(given: Path) -> str:
    """What is no checkpoint folder, and what to name as run.init_from instead."""
    from utils.sealed import name_instead  # imports torch

    if (given / "sit_ema").is_dir():
        return "an exported pipeline has no raw weights to train on, name a checkpoint of a run"
    kind = what_is(given)
    known = {"absent": "no such folder", "a folder": "it has no sit/config.json"}
    what = known.get(kind, f"it is {kind}")
    return f"{what}; {name_instead(given, 'sit')}"


def _data_errors(config: Config) -> Iterator[str]:
    """A range of depths that is none."""
    given = config.data.depth_range
    if given and (len(given) != 2 or given[0] >= given[1]):
        text = str(given).replace(" ", "")
        yield f"data.depth_range={text} must be two values, the lower one first, e.g. [0,4095]"


def _network_errors(config: Config) -> Iterator[str]:
    """Settings of the VAE, the SiT and the discriminator that cannot be used together."""
    shape, vae, disc = config.sit_shape(), config.vae, config.disc
    latents, diffusion = config.data.latents, config.loss.diffusion.vae
    if shape["hidden_size"] % (4 * shape["num_heads"]) != 0:
        yield (f"sit.hidden_size={shape['hidden_size']} must be a multiple of 4 x "
               f"sit.num_heads={shape['num_heads']}: change one")  # fmt: skip
    if vae.train and latents is not None:
        yield (f"data.latents={latents} is a cache of a frozen VAE's latents: set vae.train=false, "
               "or data.latents=null")  # fmt: skip
    if config.run.init_new and config.run.init_from is None:
        named = ",".join(config.run.init_new)
        yield (f"run.init_new=[{named}] says what is new beside the weights of run.init_from, "
               "which is null: set run.init_from, or run.init_new=[]")  # fmt: skip
    if not vae.train and vae.weights is None and config.run.init_from is None:
        yield ("vae.weights=null with vae.train=false would train on the latents of random "
               "weights: set vae.weights, or vae.train=true")  # fmt: skip
    if not vae.train and diffusion > 0:
        yield (f"loss.diffusion.vae={diffusion} needs a VAE that is trained: set vae.train=true, "
               "or loss.diffusion.vae=0")  # fmt: skip
    if disc.norm == "group" and disc.channels % 8 != 0:
        yield (f"disc.channels={disc.channels} must be a multiple of 8 with disc.norm=group, which "
               "makes groups of 8 channels: change one")  # fmt: skip
    if disc.pretrain_steps > 0 and not config.uses_disc:
        yield (f"disc.pretrain_steps={disc.pretrain_steps}, but no discriminator trains: set "
               "vae.train=true and loss.reg.gan above 0, or disc.pretrain_steps=0")  # fmt: skip
    if disc.pretrain_steps >= config.run.steps:
        yield (f"disc.pretrain_steps={disc.pretrain_steps} of run.steps={config.run.steps} leave "
               "none for the VAE and the SiT: lower the first, or raise the second")  # fmt: skip


def _loss_errors(config: Config) -> Iterator[str]:
    """Encoders without what they need, losses without theirs, guidance without a null label."""
    encoder, align, blocks = config.encoder, config.loss.align, config.sit_shape()["depth"]
    if encoder.cached and config.data.latents is None:
        yield ("encoder.cached=true reads features from the cache data.latents, which is null: set "
               "data.latents, or encoder.cached=false")  # fmt: skip
    if len(encoder.weights) not in (0, len(encoder.names)):
        yield (f"encoder.weights has {len(encoder.weights)} entries for {len(encoder.names)} "
               "encoder.names: give one (or null) for each, or []")  # fmt: skip
    if align.sit > 0 and not encoder.names:
        yield (f"loss.align.sit={align.sit} needs an encoder: name one in encoder.names, or set "
               "loss.align.sit=0 loss.align.vae=0")  # fmt: skip
    if align.sit == 0 and align.vae > 0 and config.vae.train:
        yield (f"loss.align.vae={align.vae} needs a projector, which is not trained while "
               "loss.align.sit=0: set loss.align.vae=0 too, or vae.train=false")  # fmt: skip
    if config.uses_encoder and align.depth > blocks:
        yield f"loss.align.depth={align.depth} must be at most {blocks}, the blocks of the SiT"
    reg = config.loss.reg
    if config.vae.train and reg.perceptual > 0 and not (reg.perceptual_net or "").partition("@")[0]:
        yield (f"loss.reg.perceptual={reg.perceptual} needs a network: set loss.reg.perceptual_net "
               "to NAME or NAME@FILE, e.g. timm:resnet18, or loss.reg.perceptual=0")  # fmt: skip
    for name, section in (("preview", config.preview), ("eval", config.eval)):
        guided = section.every > 0 and section.cfg_scale != 1
        if guided and config.sit.class_dropout_prob == 0:
            yield (f"{name}.cfg_scale={section.cfg_scale} needs a null label, which a SiT with "
                   f"sit.class_dropout_prob=0 does not have: set {name}.cfg_scale=1")  # fmt: skip
