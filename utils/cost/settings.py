"""The cheapest settings with which a step fits into a GPU's memory.

Checkpointing gives the same gradients, so it is tried first, from the one that costs the least time
on; micro-batches come after, as the discriminator's batch norm then sees fewer images at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from utils.config.schema import Config, per_rank_batch
from utils.cost.counter import Counted
from utils.cost.devices import Device
from utils.cost.memory import RESERVE, Estimate, estimate
from utils.cost.prediction import Step, by_phase, describe
from utils.training.networks import Networks, skeleton

# from the fastest to the slowest
CHECKPOINTING = ("none", "sit", "vae", "both")


@dataclass(frozen=True)
class Settings:
    """Settings of a run that decide about its memory, and bytes of a step with them, `RESERVE`
    included."""

    checkpointing: str
    accumulation: int
    need: int

    def __str__(self) -> str:
        return f"run.checkpointing={self.checkpointing} run.accumulation={self.accumulation}"

    def applied(self, c: Config) -> Config:
        run = {"checkpointing": self.checkpointing, "accumulation": self.accumulation}
        return replace(c, run=replace(c.run, **run))


class Estimates:
    """Memory estimates of a config with each kind of checkpointing, made when they are asked for.

    nets: those of `skeleton(c, ...)`, which the first estimate of `c` as it is uses up.
    """

    def __init__(self, c: Config, nets: Networks, train_step: Callable, ranks: int):
        self.config, self.train_step, self.ranks = c, train_step, ranks
        self.num_classes = nets.sit.config.num_classes
        self.found = {c.run.checkpointing: estimate(c, nets, train_step, ranks)}

    def of(self, checkpointing: str) -> Estimate:
        if checkpointing not in self.found:
            c = replace(self.config, run=replace(self.config.run, checkpointing=checkpointing))
            nets = skeleton(c, self.num_classes)
            self.found[checkpointing] = estimate(c, nets, self.train_step, self.ranks)
        return self.found[checkpointing]

    def kinds(self) -> Iterator[str]:
        """The kinds of checkpointing that are different for this config: a frozen VAE keeps
        nothing for a backward pass."""
        trains_vae = self.config.vae.train
        yield from CHECKPOINTING if trains_vae else CHECKPOINTING[:2]

    def cheapest(self, rank_batch: int, memory: int) -> Settings | None:
        """The first settings with which `rank_batch` images fit into `memory` bytes; None if there
        are none."""
        whole = self.fitting(rank_batch, memory, most=1)
        return next(whole, None) or min(
            self.fitting(rank_batch, memory, most=rank_batch),
            key=lambda found: found.accumulation,
            default=None,
        )

    def fitting(self, rank_batch: int, memory: int, most: int) -> Iterator[Settings]:
        """For each kind of checkpointing, the fewest micro-batches, at most `most`, that fit."""
        for kind in self.kinds():
            found = self.of(kind)
            k = found.accumulation_that_fits(rank_batch, memory)
            if k and k <= most:
                yield Settings(kind, k, found.peak(rank_batch, k) + RESERVE)


def predict_cheapest(estimates: Estimates, device: Device, ranks: int) -> dict[str, Any] | None:
    """The prediction with the cheapest settings that fit into an empty `device`, named under
    "settings"; None if nothing fits. Every micro-batch is taken to cost what the first does."""
    c = estimates.config
    rank_batch = per_rank_batch(c, ranks)
    best = estimates.cheapest(rank_batch, device.memory)
    if best is None:
        return None
    found = estimates.of(best.checkpointing)
    micro = rank_batch // best.accumulation
    phases = by_phase(extrapolated(found, micro), device, c.run.tf32)
    for name, one in phases.items():
        if name != "optimizer":
            phases[name] = one.plus(one, best.accumulation - 1)
    step = Step(phases, found.peak(rank_batch, best.accumulation))
    return describe(best.applied(c), device, ranks, step, found.resident, c.run.steps) | {
        "settings": str(best)
    }


def extrapolated(found: Estimate, images: int) -> list[Counted]:
    """The operations of a step with so many images: FLOPs and bytes are linear in their number."""
    (few, low), (more, high) = found.counted.items()
    slope = (images - few) / (more - few)

    def between(a: Counted, b: Counted) -> Counted:
        sums = {
            name: int(getattr(a.op, name) + slope * (getattr(b.op, name) - getattr(a.op, name)))
            for name in ("flops", "read", "written", "largest", "copies", "casts")
        }
        return Counted(a.phase, replace(a.op, **sums), 0)

    return [between(a, b) for a, b in zip(low, high, strict=True)]
