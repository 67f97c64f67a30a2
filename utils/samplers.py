"""Samplers of the SiT: from noise (t = 1) to latents (t = 0), by an ODE or an SDE.

SiT (arXiv 2401.08740, Sec. 2), guidance interval of arXiv 2404.07724. The state is float64, the
network runs in its own precision, everything happens in normalised latent space.

`SOLVERS` at the end of this file is the one list of solvers: the choices of --solver and of the
configuration, the least number of steps, the counts of network calls and the plots follow from it.
`PRESETS` below it are pairs of a solver and a number of steps, with their measured error.
A new ODE solver is one function and one row:

    def integrate_midpoint(field: Field, x: torch.Tensor, times: list[float]) -> torch.Tensor:
        for t, t_next in pairwise(times):
            middle = (t + t_next) / 2
            x = x + (t_next - t) * field(x + (middle - t) * field(x, t), middle)
            x = field.end_step(x, t_next)
        return x

    "ode-midpoint": Solver("second order", integrate_midpoint, lambda steps: 2 * steps),

Guidance makes the field jump at the ends of its interval. A solver that uses velocities of earlier
steps must not mix those of both sides: where `field.is_guided` changes it has to start again with a
one-step formula, as `integrate_ab2` does. A one-step solver has nothing to do.

torch is imported where it is used, so that a parser of arguments can read `SOLVERS` without it.
N batch, C latent channels, h w latent grid. x state, v velocity, t time, y label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from loss.interpolant import score_from_velocity
from models.checks.errors import UserError

if TYPE_CHECKING:
    import torch

    # x, and 1, 2, ... for the first, second, ... draw => standard normal of x's shape and dtype
    NoiseFunction = Callable[[torch.Tensor, int], torch.Tensor]
    # number of the step from 0 on, the time that it ends at, the state x there => the state from
    # which to go on, x or another of its shape
    StepFunction = Callable[[int, float, torch.Tensor], torch.Tensor]

# The default guidance interval, of `sample` and of every program: guide at all times.
GUIDANCE_INTERVAL = (0.0, 1.0)
# What decides whether Heun's corrector is guided: its own time, or that of the predictor, as in the
# reference implementation. They differ in the one step that crosses an end of the interval.
HEUN_GUIDANCE = ("own", "predictor")
# The last stochastic step of the SDE ends here: the score grows without bound at t = 0.
SDE_LAST_TIME = 0.04


def sample(
    sit: torch.nn.Module,
    noise: torch.Tensor,
    y: torch.Tensor,
    *,
    solver: str = "ode-heun",
    steps: int = 50,
    cfg_scale: float = 1.0,
    guidance: tuple[float, float] = GUIDANCE_INTERVAL,
    cfg_channels: int = 0,
    heun_guidance: str = HEUN_GUIDANCE[0],
    path: str = "linear",
    generator: torch.Generator | NoiseFunction | None = None,
    shift: float = 1.0,
    on_step: StepFunction | None = None,
) -> torch.Tensor:
    """Noise (N, C, h, w) and labels (N,) => normalised latents (N, C, h, w), float32.

    `cfg_scale` guides while guidance[0] <= t <= guidance[1], t being the time of each evaluation;
    outside only the conditional branch runs. `cfg_channels` above 0: only the first so many latent
    channels are guided, the others follow the conditional branch. `heun_guidance`: one of
    `HEUN_GUIDANCE`. `generator` feeds the SDE: torch's, for the whole
    batch at once, or a function such as `utils.sampling.noise.ImageNoise`, for which an image does
    not depend on its batch. `shift` above 1 moves the times towards the noise, see `shift_time`.
    `on_step` is called after each step, and may exchange the state.
    Raises `UserError` if `cfg_scale` is not 1 and the network has no null label.

    Nothing is read back from the device, and nothing is copied to it but the times, once.
    """
    import torch

    assert solver in SOLVERS, solver
    assert steps >= least_steps(solver), (solver, steps)
    assert heun_guidance in HEUN_GUIDANCE, heun_guidance
    with torch.no_grad():
        field = Field(sit, y, cfg_scale, guidance, path, generator)
        field.on_step = on_step
        field.cfg_channels, field.heun_guidance = cfg_channels, heun_guidance
        times = SOLVERS[solver].times(steps, shift)
        field.keep_on_device(times)
        return SOLVERS[solver].integrate(field, noise.double(), times).float()


class Field:
    """The velocity field (x, t) => v that a solver integrates, guided inside the interval.

    It also knows what only the SDE needs: the score at x, and fresh noise.
    """

    def __init__(
        self,
        sit: torch.nn.Module,
        y: torch.Tensor,
        cfg_scale: float = 1.0,
        guidance: tuple[float, float] = GUIDANCE_INTERVAL,
        path: str = "linear",
        generator: torch.Generator | NoiseFunction | None = None,
    ):
        import torch

        self.sit, self.y, self.cfg_scale, self.guidance = sit, y, cfg_scale, guidance
        self.path, self.generator, self.draws = path, generator, 0
        self.on_step: StepFunction | None = None
        self.cfg_channels, self.heun_guidance = 0, HEUN_GUIDANCE[0]
        self.steps_done = 0
        self.kept_times: dict[float, torch.Tensor] = {}
        # A module without weights (an analytic field) sees the state as it is.
        self.dtype = next((p.dtype for p in sit.parameters()), torch.float64)
        # Times stay float32 for a bfloat16 network: bfloat16 cannot tell 0.996 from 1.
        self.time_dtype = torch.promote_types(self.dtype, torch.float32)
        if cfg_scale == 1:
            return
        null_label = getattr(sit, "null_label", None)
        if null_label is None:
            raise UserError(
                f"cfg_scale {cfg_scale}: this SiT was trained without a null label, so it has no "
                "unconditional velocity to guide by; leave cfg_scale 1"
            )
        self.y_both = y.new_full((2 * len(y),), null_label)
        self.y_both[: len(y)] = y

    def keep_on_device(self, times: Sequence[float]) -> None:
        """Copy the times of a solver to the device at once: at each network call, a copy would wait
        for the GPU to run dry."""
        import torch

        on_device = copy_without_wait(torch.tensor(times, dtype=self.time_dtype), self.y.device)
        self.kept_times = dict(zip(times, on_device.unbind()))

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """The velocity at time t, (N, C, h, w) float64; guided if t is in the interval."""
        return self.velocity(x, t, self.is_guided(t))

    def velocity(self, x: torch.Tensor, t: float, guided: bool) -> torch.Tensor:
        """u + cfg_scale (c - u) of the conditional velocity c and the unconditional u, which run
        in one network call of 2 N; not guided, c alone."""
        import torch

        x = x.to(self.dtype)
        if not guided:
            return self._velocity(x, t, self.y)
        cond, uncond = self._velocity(x.repeat(2, 1, 1, 1), t, self.y_both).chunk(2)
        v = uncond + self.cfg_scale * (cond - uncond)
        if not self.cfg_channels:
            return v
        return torch.cat([v[:, : self.cfg_channels], cond[:, self.cfg_channels :]], dim=1)

    def corrector(self, x: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
        """The velocity of Heun's corrector, at the x where its predictor from time t landed."""
        decides = t if self.heun_guidance == "predictor" else t_next
        return self.velocity(x, t_next, self.is_guided(decides))

    def is_guided(self, t: float) -> bool:
        """Whether an evaluation at time t runs both branches."""
        return self.cfg_scale != 1 and self.guidance[0] <= t <= self.guidance[1]

    def _velocity(self, x: torch.Tensor, t: float, y: torch.Tensor) -> torch.Tensor:
        time = self.kept_times.get(t)
        if time is None:  # a time between those of the solver
            time = x.new_full((), t, dtype=self.time_dtype)
        return self.sit(x, time.expand(len(x)), y)[0].double()

    def end_step(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """What a solver calls after each step, with the state at time t; it goes on from what this
        returns: x itself, unless somebody who looks on has changed it."""
        self.steps_done += 1
        return self.on_step(self.steps_done - 1, t, x) if self.on_step else x

    def sde_drift(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """v - w s / 2, (N, C, h, w), with the diffusion coefficient w(t) = 2 t and the score s.

        Affine in v: the drift of a guided velocity is the guided drift.
        """
        import torch

        v, time = self(x, t), torch.tensor(t, dtype=torch.float64)
        return v - time * score_from_velocity(v, x, time, self.path)

    def fresh_noise(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal of x's shape and dtype: the next draw of the generator."""
        import torch

        self.draws += 1
        if callable(self.generator):
            return self.generator(x, self.draws)
        device = x.device if self.generator is None else self.generator.device
        noise = torch.randn(x.shape, dtype=x.dtype, generator=self.generator, device=device)
        return copy_without_wait(noise, x.device)


def copy_without_wait(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`. From pageable memory, a copy would wait for the GPU to run dry."""
    import torch

    if device.type == "cuda" and values.device.type == "cpu" and torch.cuda.is_available():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


# --------------------------------------------------------------------------------------
# Times, from 1 to 0.


def shift_time(t: float, shift: float) -> float:
    """Timestep shift t => shift t / (1 + (shift - 1) t) (SD3, arXiv 2403.03206, Eq. 23): above 1
    more steps where it is noisy. 0 and 1 stay; 1 / shift is the inverse."""
    return shift * t / (1 + (shift - 1) * t)


def ode_times(steps: int, shift: float = 1.0) -> list[float]:
    """The steps + 1 ends of the steps."""
    return _shifted(0.0, steps + 1, shift)


def sde_times(steps: int, shift: float = 1.0) -> list[float]:
    """The `steps` times from 1 to `SDE_LAST_TIME`, whatever the shift: the last step, from there to
    0, leaves about that much noise."""
    return _shifted(shift_time(SDE_LAST_TIME, 1 / shift), steps, shift)


def _shifted(last: float, num: int, shift: float) -> list[float]:
    import torch

    return [
        shift_time(t, shift) for t in torch.linspace(1, last, num, dtype=torch.float64).tolist()
    ]


# --------------------------------------------------------------------------------------
# Solvers: (field, x, times) => x at time 0, float64.


def integrate_euler(field: Field, x: torch.Tensor, times: list[float]) -> torch.Tensor:
    for t, t_next in pairwise(times):
        x = field.end_step(x + (t_next - t) * field(x, t), t_next)
    return x


def integrate_heun(field: Field, x: torch.Tensor, times: list[float]) -> torch.Tensor:
    """Euler, corrected by the velocity where it lands; the last step, to t = 0, is left Euler."""
    for t, t_next in pairwise(times):
        v = field(x, t)
        x_next = x + (t_next - t) * v
        if t_next != 0:
            x_next = x + (t_next - t) * 0.5 * (v + field.corrector(x_next, t, t_next))
        x = field.end_step(x_next, t_next)
    return x


def integrate_ab2(field: Field, x: torch.Tensor, times: list[float]) -> torch.Tensor:
    """Two-step Adams-Bashforth for unequal steps: one network call a step, second order.

    The first step is Euler's, and so is the one after guidance sets in or ends: there the field
    jumps, and the velocity of the step before belongs to another field.
    """
    v_before, t_before = None, None
    for t, t_next in pairwise(times):
        v, dt = field(x, t), t_next - t
        if v_before is None or t_before is None or field.is_guided(t) != field.is_guided(t_before):
            x = x + dt * v
        else:
            half = dt / (t - t_before) / 2
            x = x + dt * ((1 + half) * v - half * v_before)
        x = field.end_step(x, t_next)
        v_before, t_before = v, t
    return x


def integrate_sde(field: Field, x: torch.Tensor, times: list[float]) -> torch.Tensor:
    """Euler-Maruyama: a stochastic step between each two of `times`, then one without to 0."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        mean = x + dt * field.sde_drift(x, t)
        x = field.end_step(mean + math.sqrt(2 * t * abs(dt)) * field.fresh_noise(x), t_next)
    return field.end_step(x - times[-1] * field.sde_drift(x, times[-1]), 0.0)


class Solver(NamedTuple):
    # what it is, in a few words
    summary: str
    # (field, x at time 1, times) => x at time 0
    integrate: Callable[[Field, torch.Tensor, list[float]], torch.Tensor]
    # number of steps => number of network calls
    network_calls: Callable[[int], int]
    least_steps: int = 1
    # (number of steps, shift) => the times that `integrate` gets
    times: Callable[[int, float], list[float]] = ode_times


SOLVERS = {
    "ode-euler": Solver("first order", integrate_euler, lambda steps: steps),
    "ode-heun": Solver(
        "second order: Euler, corrected where it lands", integrate_heun, lambda steps: 2 * steps - 1
    ),
    "ode-ab2": Solver(
        "second order, from the velocity of the step before too (Adams-Bashforth)",
        integrate_ab2,
        lambda steps: steps,
    ),
    "sde": Solver(
        "Euler-Maruyama, the sampler of the published tables",
        integrate_sde,
        lambda steps: steps,
        least_steps=2,
        times=sde_times,
    ),
}


def least_steps(solver: str) -> int:
    """The smallest number of steps that a solver of `SOLVERS` can take."""
    return SOLVERS[solver].least_steps


def network_calls(solver: str, steps: int) -> int:
    """How often a solver of `SOLVERS` calls the network; a guided call counts once."""
    return SOLVERS[solver].network_calls(steps)


def rows_of_calls(
    solver: str,
    steps: int,
    cfg_scale: float = 1.0,
    guidance: tuple[float, float] = GUIDANCE_INTERVAL,
    shift: float = 1.0,
) -> list[int]:
    """Of each network call, how many rows it has for an image: 2 where it is guided, else 1. Their
    sum times the FLOPs of one row is what an image costs."""
    import torch

    class Counter(Field):
        def velocity(self, x: torch.Tensor, t: float, guided: bool) -> torch.Tensor:
            rows.append(1 + guided)
            return x

    rows: list[int] = []
    field = Counter(torch.nn.Identity(), torch.zeros(1))
    field.cfg_scale, field.guidance = cfg_scale, guidance
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    SOLVERS[solver].integrate(field, zero, SOLVERS[solver].times(steps, shift))
    return rows


# --------------------------------------------------------------------------------------
# Presets.


class Preset(NamedTuple):
    solver: str
    steps: int
    # root mean square error of the latents of Gaussian data, whose spread is about 0.6
    # (scripts/plot_solvers.py); None: a stochastic solver has no one solution
    error: float | None


# The first one is the default.
PRESETS = {
    "published": Preset("sde", 250, None),
    "fine": Preset("ode-ab2", 128, 5.7e-5),
    "fast": Preset("ode-ab2", 64, 2.3e-4),
    "draft": Preset("ode-ab2", 32, 9.7e-4),
}
