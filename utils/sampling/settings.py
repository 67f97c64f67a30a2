"""Every setting of sampling, once: flags, their help and checks, hash and JSON derive from here.

Imports no torch, so that --help is quick.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from loss.interpolant import PATHS
from models.checks.errors import UserError
from utils import cli
from utils.records import Range
from utils.samplers import (
    GUIDANCE_INTERVAL,
    HEUN_GUIDANCE,
    PRESETS,
    SOLVERS,
    Preset,
    least_steps,
    network_calls,
)

# Images in a finished block on disk, and so the largest batch. A block is what a kill can cost each
# rank; small ones are shared evenly: 8 ranks make 50,000 images in 63 rounds, 62.5 would be ideal.
# 100 images or fewer are made by one rank: more would have to take smaller batches.
BLOCK = 100
# Default batches, of the SiT and of the VAE's decoder.
BATCH_SIZE, DECODE_BATCH_SIZE = 64, 16
LOW, HIGH = GUIDANCE_INTERVAL
DEFAULT = next(iter(PRESETS))
SHIFT: dict[str, Any] = {"above": 1e-3, "at_most": 1000}
SCALE: dict[str, Any] = {"at_least": 0, "at_most": 1000}
# of settings that decide speed and memory alone
SPEED: dict[str, Any] = {"at_least": 1, "pixels": False}


def setting(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] = (),
    pixels: bool = True,
    added: bool = False,
    **sides: float,
) -> Any:
    """A field with a default. `sides` are those of a `Range`; `pixels`: whether it is part of what
    identifies samples. `added`: samples were recorded before there was this choice, so it is on
    record only where it is not the default. Without `help` it has no flag of its own."""
    metadata = {"help": help, "choices": tuple(choices), "pixels": pixels, "added": added}
    return field(default=default, metadata=metadata | {"range": Range(**sides) if sides else None})


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled, whatever the checkpoint and the number of images. Each field with a
    help text is a flag, e.g. --cfg-scale. A solver and its steps are chosen together by --preset,
    and each by its own flag, which wins."""

    solver: str = setting(PRESETS[DEFAULT].solver, "see utils/samplers.py", choices=SOLVERS)
    steps: int = setting(PRESETS[DEFAULT].steps, "of the solver", at_least=1, at_most=10**6)
    cfg_scale: float = setting(1.0, "classifier-free guidance; 1 = none", **SCALE)
    guidance_low: float = setting(LOW, "guide from this t (0 = data) ...", at_least=0, at_most=1)
    guidance_high: float = setting(HIGH, "... to this t (1 = noise)", at_least=0, at_most=1)
    cfg_channels: int = setting(
        0, "guide only the first N latent channels; 0 = all", at_least=0, added=True
    )
    heun_guidance: str = setting(
        HEUN_GUIDANCE[0],
        "whose time decides whether Heun's corrector is guided; predictor = as published",
        choices=HEUN_GUIDANCE,
        added=True,
    )
    timestep_shift: float = setting(1.0, "above 1: more steps near the noise", **SHIFT)
    class_balanced: bool = setting(False, "labels 0, 1, 2, ... in turn, not at random")
    # labels that are taken in turn, in place of all; programs name them by --classes
    classes: tuple[int, ...] = setting((), "", added=True)
    seed: int = setting(0, "image i depends on (seed, i) alone", at_least=0)
    precision: str = setting("bf16", "of the SiT", choices=("bf16", "fp32"))
    decode_precision: str | None = setting(
        None, "of the VAE; default: fp32, with --tf32 tf32", choices=("fp32", "tf32", "bf16")
    )
    path: str | None = setting(None, "interpolant; default: that of the run", choices=PATHS)
    uint8: str = setting("round", "truncate = as published", choices=("round", "truncate"))
    tf32: bool = setting(False, "TF32 in what is float32, as the published samples")
    compile: bool = setting(False, "torch.compile SiT and decoder, for one size of batches")
    batch_size: int = setting(BATCH_SIZE, "images of a network call", **SPEED, at_most=BLOCK)
    decode_batch_size: int = setting(DECODE_BATCH_SIZE, "images the VAE decodes at a time", **SPEED)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, **defaults: Any) -> None:
        """One flag for each field, and --preset, for `from_args`. `defaults` are a program's own:
        of any field, or the name of a preset in place of `solver` and `steps`."""
        chosen = defaults.pop("preset", DEFAULT)
        parser.add_argument("--preset", choices=PRESETS, default=chosen, help=describe_presets())
        for f in flag_fields():
            how: dict[str, Any] = {"action": "store_true"}
            if not isinstance(f.default, bool):
                how = {"type": flag_type(f)}
                how |= {"default": defaults.get(f.name, f.default)}
                how |= {"choices": f.metadata["choices"] or None}
            help = f.metadata["help"]
            if f.name in Preset._fields and f.name not in defaults:
                how, help = how | {"default": None}, f"{help}; default: that of --preset"
            parser.add_argument(flag_of(f.name), help=help, **how)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> SamplingSettings:
        """The settings among the arguments; `UserError` for values that no run could use."""
        given: dict[str, Any] = {f.name: getattr(args, f.name) for f in flag_fields()}
        preset: dict[str, Any] = PRESETS[args.preset]._asdict()
        settings = cls(**given | {n: preset[n] for n in preset.keys() & given if given[n] is None})
        settings.check()
        return settings

    def check(self) -> None:
        """Raise `UserError` for values that no run could use."""
        for f in fields(self):
            flag = flag_of(f.name)
            value: Any = getattr(self, f.name)
            choices, allowed = f.metadata["choices"], f.metadata["range"]
            if choices and value != f.default and value not in choices:
                raise UserError(f"{flag} {value} must be one of {', '.join(choices)}")
            if allowed is not None and value not in allowed:
                words = str(allowed) if math.isfinite(value) else "a finite number"
                raise UserError(f"{flag} {value} must be {words}")
        solver, steps, least = self.solver, self.steps, least_steps(self.solver)
        if steps < least:
            raise UserError(f"--solver {solver} needs {least} steps or more, not {steps}")
        if self.heun_guidance != HEUN_GUIDANCE[0] and solver != "ode-heun":
            text = f"--heun-guidance {self.heun_guidance} needs --solver ode-heun"
            raise UserError(f"{text}: {solver} has no corrector")
        low, high = self.guidance_low, self.guidance_high
        if low > high:
            raise UserError(f"--guidance-low {low} must not be above --guidance-high {high}")

    def that_decide_pixels(self) -> dict[str, Any]:
        """What identifies samples: every field but those that decide speed and memory alone."""
        values = asdict(self) | {"classes": list(self.classes)}
        values["decode_precision"] = self.decode_precision or ("tf32" if self.tf32 else "fp32")
        kept = [f.name for f in fields(self) if f.metadata["pixels"]]
        kept = [name for name in kept if name not in ADDED or getattr(self, name) != ADDED[name]]
        return {name: values[name] for name in kept}


# What it means that a record lacks a setting: see `added` of `setting`.
ADDED: dict[str, Any] = {f.name: f.default for f in fields(SamplingSettings) if f.metadata["added"]}


def add_classes(parser: argparse.ArgumentParser) -> None:
    """The flag --classes: words, for `utils.sampling.labels.labels_of`."""
    help = "labels or names, with commas between them: images of these in turn; may be repeated"
    parser.add_argument("--classes", action="append", default=[], metavar="A,B,...", help=help)


def check_classes(args: argparse.Namespace) -> None:
    """`UserError` if --classes names none, or does not go with another flag."""
    if any(not word.strip() for words in args.classes for word in words.split(",")):
        raise UserError(f"--classes {args.classes[0]!r}: expected labels or names, e.g. 207,360")
    if args.classes and args.class_balanced:
        raise UserError("--classes are taken in turn already: leave out --class-balanced")


def flag_fields() -> list[Field]:
    """The settings that have a flag of their own."""
    return [f for f in fields(SamplingSettings) if f.metadata["help"]]


def flag_type(f: Field) -> Callable[[str], Any]:
    """What turns the text behind a field's flag into its value."""
    kind = str if f.default is None else type(f.default)
    sides = f.metadata["range"] or Range()
    return cli.number(kind, **sides._asdict()) if kind in (int, float) else kind


def describe_presets() -> str:
    """The presets in one line, for the help."""
    words = []
    for name, preset in PRESETS.items():
        calls = network_calls(preset.solver, preset.steps)
        error = f", error {preset.error:.1e}" if preset.error else ""
        words.append(f"{name} = {preset.solver}, {preset.steps} steps ({calls} calls{error})")
    return f"solver and steps: {'; '.join(words)}"


def flag_of(name: str) -> str:
    """Name of a field => its flag."""
    return f"--{name.replace('_', '-')}"
