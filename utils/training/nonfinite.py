"""What follows numbers that are not finite, which steps are left out, and warnings before it.

`run.on_nonfinite` says what follows a loss, a gradient or a weight that is not finite:

    stop       the run ends by name, exit code 1; its checkpoints are good
    skip       the update of each network whose gradient is not finite is left out, with what else
               that step would have moved: latent-norm and batch-norm statistics, LeCam, EMA
    rollback   the newest checkpoint is restored and the first bad step is left out from then on:
               it is recorded in the run folder, so that a resumed run leaves it out too

Whatever the policy, no checkpoint is written of a state that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.checkpoint import Checkpoints
from utils.config.schema import Config
from utils.distributed import Ranks
from utils.files import reason, write_json
from utils.records import load_record, number

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteError(RuntimeError):
    """Numbers of a run stopped being finite: the message names the first term or network and its
    step. `step` (0-based): what `rollback` would leave out; None if that would not help."""

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


def require_finite(
    state: Mapping[str, Sequence[Tensor]], accelerator: Accelerator, step: int
) -> None:
    """Raise `NonFiniteError` on every rank if a tensor of `state`, by what it belongs to, is not
    finite on any; `step` steps are done. The host waits for the device once."""
    # a rank may have none of what is shared out, and takes part all the same
    largest = [_largest(_numbers(tensors), accelerator.device) for tensors in state.values()]
    flags = torch.stack(largest).isfinite().logical_not()
    found: Any = accelerator.reduce(flags.float(), "sum")
    names = [name for name, bad in zip(state, found.tolist()) if bad]
    if names:
        raise NonFiniteError(f"not finite after step {step - 1}: {', '.join(names)}", step - 1)


def _numbers(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors if t.is_floating_point() and t.numel()]


def _largest(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Largest absolute value, (), on `device`; NaN if there is one, 0 if there is nothing."""
    if not tensors:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(tensors, math.inf)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).max()


# --------------------------------------------------------------------------------------
# Updates that are left out, without the host waiting for the device.


class SkippedUpdates:
    """Counts, on the device, the updates of one network that were left out."""

    def __init__(self, device: torch.device):
        # in all; in a row, up to now; the longest such row
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, skipped: Tensor) -> None:
        """`skipped` (), bool: whether the update of this step was left out."""
        total, in_a_row, longest = self.counts.unbind()
        total += skipped
        in_a_row.add_(1).mul_(skipped)
        torch.maximum(longest, in_a_row, out=longest)

    def state_dict(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.counts.copy_(state["counts"])


class UpdateGuard:
    """Leaves out the updates of one network that are not finite (`run.on_nonfinite=skip`).

    `statistics`: tensors that a step moves besides the weights. They are put back with the update,
    to what they were at the last call of `remember` or the end of the last step.
    """

    def __init__(self, statistics: Iterable[Tensor]):
        self.statistics = list(statistics)
        self.floats = _numbers(self.statistics)
        self.before = [tensor.clone() for tensor in self.statistics]

    def remember(self) -> None:
        """Take the statistics as they are for those to go back to."""
        for now, before in zip(self.statistics, self.before):
            before.copy_(now)

    def gradient_of(self, loss: Tensor) -> Tensor:
        """What backward starts from, () like `loss`: 1, or NaN if the loss is not finite, since a
        loss of one rank may be infinite while its gradient is not."""
        return torch.where(loss.detach().isfinite(), 1.0, math.nan)

    @torch.no_grad()
    def check(self, norm: Tensor) -> Tensor:
        """(), bool: whether the update is to be left out, as the `norm` of the gradients, equal on
        all ranks, or the statistics are not finite; the statistics are then put back."""
        largest = torch.stack([norm.detach(), _largest(self.floats, norm.device)])
        bad = largest.isfinite().all().logical_not()
        for now, before in zip(self.statistics, self.before):
            now.copy_(torch.where(bad, before, now))
            before.copy_(now)
        return bad


def check_skipped(skipped: Mapping[str, SkippedUpdates], limit: int, fp16: bool) -> dict[str, int]:
    """{"skipped/NETWORK": updates left out so far}. Raises `NonFiniteError` if these are more than
    `limit`: in all, or under fp16, whose loss scale leaves out some now and then, in a row."""
    if not skipped:
        return {}
    rows = torch.stack([s.counts for s in skipped.values()]).tolist()
    for name, (total, _, longest) in zip(skipped, rows):
        if (longest if fp16 else total) > limit:
            how = f"{longest} in a row" if fp16 else f"{total}"
            remedy = "; fp16 may not suit this run: set run.precision=bf16" if fp16 else ""
            raise NonFiniteError(
                f"gradients of {name} were not finite: {how} updates left out, more than "
                f"run.max_nonfinite={limit}{remedy}"
            )
    return {f"skipped/{name}": total for name, (total, _, _) in zip(skipped, rows)}


# --------------------------------------------------------------------------------------
# Steps that are left out as a whole.


@dataclass
class BadStep:
    """A step that `rollback` leaves out, and why."""

    step: int = number(at_least=0)
    reason: str = ""


@dataclass
class BadSteps:
    """RUN_DIR/left_out_steps.json."""

    steps: list[BadStep] = field(default_factory=list)


class LeftOutSteps:
    """The steps of a run without an update: those of `run.skip_steps`, and those that a rollback of
    this run has recorded. Their images are not read; all else of them counts (warm-ups, epochs)."""

    def __init__(self, config: Config):
        run = config.run
        self.rolls_back, self.limit = run.on_nonfinite == "rollback", run.max_nonfinite
        self.listed, self.path = frozenset(run.skip_steps), config.run_dir / "left_out_steps.json"
        self.recorded: list[BadStep] = []
        if self.path.exists():
            remedy = "correct it, or delete it: its steps are then tried again"
            self.recorded = load_record(self.path, BadSteps, remedy).steps

    @property
    def steps(self) -> frozenset[int]:
        return self.listed | self.steps_of_rollbacks

    @property
    def steps_of_rollbacks(self) -> frozenset[int]:
        return frozenset(bad.step for bad in self.recorded)

    def batches(self, loader: Iterable, first: int, end: int) -> Iterator[tuple[int, Any]]:
        """(step, batch of `loader`) for the steps from `first` to before `end`, with None in place
        of the batch of a step that is left out: `loader` does not have it."""
        iterator = iter(loader)
        for step in range(first, end):
            yield step, None if step in self.steps else next(iterator)

    def roll_back(
        self, error: NonFiniteError, checkpoints: Checkpoints, origin: tuple[Path | None, int]
    ) -> tuple[Path, int]:
        """The checkpoint to go on from after `error`, whose step is left out from now on, and the
        checkpoint's step; the same on every rank. `origin`: those that the program started from.
        Raises `error`, or one with its words, if it ends the run."""
        if not self.rolls_back or error.step is None or error.step in self.steps:
            raise error
        if len(self.recorded) >= self.limit:
            text = f"{error}; run.max_nonfinite={self.limit} rollbacks are used up"
            raise NonFiniteError(text) from None
        ranks = Ranks()
        newest = ranks.on_main(lambda: checkpoints.latest(report=lambda _: None))
        checkpoint, first = (newest, int(newest.name)) if newest else origin
        if checkpoint is None:
            raise NonFiniteError(f"{error}; there is no checkpoint to go back to") from None
        self.recorded.append(BadStep(error.step, str(error)))
        if problem := ranks.on_main(self._write):
            raise NonFiniteError(f"{error}; {self.path} cannot be written ({problem})") from None
        ranks.print(f"\n{error}: going back to {checkpoint}, leaving out step {error.step}")
        return checkpoint, first

    def _write(self) -> str | None:
        """Why the record could not be written; None if it was."""
        try:
            write_json(self.path, asdict(BadSteps(self.recorded)))
        except OSError as error:
            return reason(error)
        return None


# --------------------------------------------------------------------------------------
# Warnings.

COLLAPSED = 0.1  # share of the first log line's spatial variance of latents
MOST_OF_START = 0.05  # share of the first weights in the EMA at the end of a run
EMA_PARTS = 40  # 400,000 steps and ema.decay=0.9999, which averages 10,000
SATURATED = 0.01  # distance of the hinge loss from 1 or 0
SATURATED_LINES = 10  # that many log lines in a row


def spatial_variance(z: Tensor) -> Tensor:
    """Latents (N, C, h, w) => (): variance over h and w, averaged over images and channels. Naive
    end-to-end training lets it vanish: constant latents are easy to denoise."""
    return z.detach().float().var(dim=(-2, -1), unbiased=False).mean()


def ema_warning(config: Config) -> tuple[float, str] | None:
    """The number of steps that the EMA averages, and words, if the start of the run is left in it
    at the end. With warm-up it averages no more than the last ninth of a short run."""
    steps, decay = config.run.steps - config.disc.pretrain_steps, config.ema.decay
    left, reach = decay**steps, 1 / (1 - decay)
    if config.ema.warmup or left < MOST_OF_START:
        return None
    origin = config.run.init_from or "the random start"
    return reach, (
        f"ema.decay={decay} averages about {reach:,.0f} steps, the run has {steps:,}: {left:.0%} "
        f"of what is sampled would be left of {origin}; set ema.decay={fitting_decay(steps)}, or "
        "ema.warmup=true"
    )


def fitting_decay(steps: int) -> float:
    """The decay of an EMA that averages about a fortieth of the run, as in the published one."""
    return round(1 - min(0.5, float(f"{EMA_PARTS / steps:.1g}")), 12)


class Warnings:
    """Looks at each log line; a warning is reported once, and is a number in that line."""

    def __init__(self, config: Config):
        self.config = config
        self.start_variance: float | None = None
        self.lines = {"dead": 0, "won": 0}
        self.given: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "start_variance": self.start_variance,
            "lines": dict(self.lines),
            "given": list(self.given),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start_variance = state["start_variance"]
        self.lines, self.given = dict(state["lines"]), list(state["given"])

    def look_ahead(self, report: Callable[[str], None]) -> None:
        """Report what is known before the first step, unless an earlier part of the run has."""
        known = ema_warning(self.config)
        if known and "ema_reach" not in self.given:
            report(known[1])

    def look_at(self, row: Mapping[str, float], report: Callable[[str], None]) -> dict[str, float]:
        """The new warnings about a log line, whose values are means over all ranks:
        {"warning/NAME": value}; `report` gets the words of each."""
        found = {"ema_reach": ema_warning(self.config)}
        found["latent_variance"] = self._collapse(row.get("vae/latent_variance", math.nan))
        found["discriminator_hinge"] = self._saturation(row.get("loss/disc/hinge", math.nan))
        new = {name: w for name, w in found.items() if w is not None and name not in self.given}
        self.given += new
        for name, (_, words) in new.items():
            if name != "ema_reach":  # was said at the start
                report(words)
        return {f"warning/{name}": value for name, (value, _) in new.items()}

    def _collapse(self, variance: float) -> tuple[float, str] | None:
        if self.start_variance is None and math.isfinite(variance):
            self.start_variance = variance
        start = self.start_variance or 0.0
        if not variance < COLLAPSED * start:
            return None
        return variance / start, (
            f"the latents collapse: their spatial variance is {variance:.3g}, at the start it was "
            f"{start:.3g}; see loss.diffusion.vae, loss.align.vae and vae.optim.lr"
        )

    def _saturation(self, hinge: float) -> tuple[float, str] | None:
        for name, stuck in (("dead", 1.0), ("won", 0.0)):
            self.lines[name] = self.lines[name] + 1 if abs(hinge - stuck) < SATURATED else 0
        if max(self.lines.values()) < SATURATED_LINES:
            return None
        what = "tells nothing apart" if self.lines["dead"] else "tells all apart"
        return hinge, (
            f"the discriminator is saturated: it {what}, its hinge loss is {hinge:.3g} for "
            f"{SATURATED_LINES} log lines; see loss.reg.gan and disc.optim.lr"
        )
