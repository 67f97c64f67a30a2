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
from models.errors import UserError
from utils import cli
from utils.records import Range
from utils.samplers import GUIDANCE_INTERVAL, SOLVERS, least_steps

# Images in a finished block on disk, and so the largest batch. A block is what a kill can cost each
# rank; small ones are shared evenly: 8 ranks make 50,000 images in 63 rounds, 62.5 would be ideal.
# 100 images or fewer are made by one rank: more would have to take smaller batches.
BLOCK = 100
LOW, HIGH = GUIDANCE_INTERVAL
SHIFT: dict[str, Any] = {"above": 1e-3, "at_most": 1000}
SCALE: dict[str, Any] = {"at_least": 0, "at_most": 1000}
# of settings that decide speed and memory alone
SPEED: dict[str, Any] = {"at_least": 1, "pixels": False}


def setting(
    default: Any, help: str, *, choices: Iterable[str] = (), pixels: bool = True, **sides: float
) -> Any:
    """A field with a default. `sides` are those of a `Range`; `pixels`: whether it is part of what
    identifies samples."""
    metadata = {"help": help, "choices": tuple(choices), "pixels": pixels}
    return field(default=default, metadata=metadata | {"range": Range(**sides) if sides else None})


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled, whatever the checkpoint and the number of images. Each field is a
    flag, e.g. --cfg-scale. Default solver and steps are those of the published tables."""

    solver: str = setting("sde", "see utils/samplers.py", choices=SOLVERS)
    steps: int = setting(250, "steps of the solver", at_least=1, at_most=10**6)
    cfg_scale: float = setting(1.0, "classifier-free guidance; 1 = none", **SCALE)
    guidance_low: float = setting(LOW, "guide from this t (0 = data) ...", at_least=0, at_most=1)
    guidance_high: float = setting(HIGH, "... to this t (1 = noise)", at_least=0, at_most=1)
    timestep_shift: float = setting(1.0, "above 1: more steps near the noise", **SHIFT)
    class_balanced: bool = setting(False, "labels 0, 1, 2, ... in turn, not at random")
    seed: int = setting(0, "image i depends on (seed, i) alone", at_least=0)
    precision: str = setting("bf16", "of the SiT; the VAE is fp32", choices=("bf16", "fp32"))
    path: str | None = setting(None, "interpolant; default: that of the run", choices=PATHS)
    uint8: str = setting("round", "truncate = as published", choices=("round", "truncate"))
    tf32: bool = setting(False, "TF32 in what is float32, as the published samples")
    compile: bool = setting(False, "torch.compile the SiT")
    batch_size: int = setting(64, "images per rank and network call", **SPEED, at_most=BLOCK)
    decode_batch_size: int = setting(16, "images the VAE decodes at a time", **SPEED)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, **defaults: Any) -> None:
        """One flag for each field, for `from_args`. `defaults` are a program's own."""
        for f in fields(cls):
            how: dict[str, Any] = {"action": "store_true"}
            if not isinstance(f.default, bool):
                how = {"type": flag_type(f)}
                how |= {"default": defaults.get(f.name, f.default)}
                how |= {"choices": f.metadata["choices"] or None}
            parser.add_argument(flag_of(f.name), help=f.metadata["help"], **how)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> SamplingSettings:
        """The settings among the arguments; `UserError` for values that no run could use."""
        settings = cls(**{f.name: getattr(args, f.name) for f in fields(cls)})
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
            raise UserError(f"--solver {solver} needs --steps {least} or more, not {steps}")
        low, high = self.guidance_low, self.guidance_high
        if low > high:
            raise UserError(f"--guidance-low {low} must not be above --guidance-high {high}")

    def that_decide_pixels(self) -> dict[str, Any]:
        """What identifies samples: every field but those that decide speed and memory alone."""
        values = asdict(self)
        return {f.name: values[f.name] for f in fields(self) if f.metadata["pixels"]}


def flag_type(f: Field) -> Callable[[str], Any]:
    """What turns the text behind a field's flag into its value."""
    kind = str if f.default is None else type(f.default)
    sides = f.metadata["range"] or Range()
    return cli.number(kind, **sides._asdict()) if kind in (int, float) else kind


def flag_of(name: str) -> str:
    """Name of a field => its flag."""
    return f"--{name.replace('_', '-')}"
