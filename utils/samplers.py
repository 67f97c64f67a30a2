"""Samplers of the SiT: from noise (t = 1) to latents (t = 0), ODE and SDE.

SiT (arXiv 2401.08740, Sec. 2); guidance interval of arXiv 2404.07724. The state is float64, the
network runs in its own precision. Everything happens in normalised latent space.

    solver      network calls   what
    ode-euler   steps           first order
    ode-heun    2 steps - 1     second order: Euler, corrected where it lands
    ode-ab2     steps           second order from the velocity of the step before (Adams-Bashforth)
    sde         steps           Euler-Maruyama, the sampler of the published tables

N batch, C latent channels, h w latent grid. x state, v velocity, t time, y label.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from loss.interpolant import score_from_velocity

SOLVERS = ("ode-euler", "ode-heun", "ode-ab2", "sde")
SDE_LAST_TIME = 0.04  # the last stochastic step ends here: the score grows without bound at t = 0

Generators = torch.Generator | Sequence[torch.Generator] | None
Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x, scalar t) -> velocity of x


@torch.no_grad()
def sample(
    sit: torch.nn.Module,
    noise: torch.Tensor,
    y: torch.Tensor,
    *,
    solver: str = "ode-heun",
    steps: int = 50,
    cfg_scale: float = 1.0,
    guidance: tuple[float, float] = (0.0, 1.0),
    path: str = "linear",
    generator: Generators = None,
    shift: float = 1.0,
) -> torch.Tensor:
    """Noise (N, C, h, w) and labels (N,) => normalised latents (N, C, h, w), float32.

    `cfg_scale` guides while guidance[0] <= t <= guidance[1], t being the time of each evaluation;
    outside only the conditional branch runs. `generator` feeds the SDE: one for the whole batch, or
    one for each image (then an image does not depend on its batch); on the generator's device.
    `shift` above 1 moves the times towards the noise, see `shift_times`.
    """
    assert solver in SOLVERS, solver
    assert steps >= (2 if solver == "sde" else 1), (solver, steps)
    field = guided_field(sit, y, cfg_scale, guidance)
    times = solver_times(solver, steps, shift)
    x = noise.double()
    if solver == "sde":
        return integrate_sde(field, x, times, path, generator).float()
    if solver == "ode-ab2":
        guided = [is_guided(t, cfg_scale, guidance) for t in times]
        return integrate_ab2(field, x, times, guided).float()
    step = {"ode-euler": _euler_step, "ode-heun": _heun_step}[solver]
    for t, t_next in pairwise(times):
        x = step(field, x, t, t_next)
    return x.float()


def solver_times(solver: str, steps: int, shift: float = 1.0) -> torch.Tensor:
    """The ends of the steps, float64: (steps + 1,) from 1 to 0, or for the SDE (steps,) from 1 to
    `SDE_LAST_TIME`, whatever the shift: the step from there to 0 leaves about that much noise."""
    if solver != "sde":
        return shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    last = shift_times(torch.tensor(SDE_LAST_TIME, dtype=torch.float64), 1 / shift)
    return shift_times(torch.linspace(1, float(last), steps, dtype=torch.float64), shift)


def shift_times(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Timestep shift t => shift t / (1 + (shift - 1) t) (SD3, arXiv 2403.03206, Eq. 23): above 1
    more steps where it is noisy. 0 and 1 stay; 1 / shift is the inverse."""
    return shift * t / (1 + (shift - 1) * t)


def guided_field(
    sit: torch.nn.Module, y: torch.Tensor, cfg_scale: float, guidance: tuple[float, float]
) -> Field:
    """The field (x, t) => u + cfg_scale (c - u), float64, of the conditional velocity c and the
    unconditional u; both branches run in one network call of 2 N."""

    def velocity(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # times stay float32 for a bfloat16 network: bfloat16 cannot tell 0.996 from 1; a module
        # without weights (an analytic field) sees the state as it is
        dtype = next((p.dtype for p in sit.parameters()), x.dtype)
        times = t.to(x.device, x.dtype if dtype == x.dtype else torch.float32).expand(len(x))
        v, _ = sit(x.to(dtype), times, labels)
        return v.double()

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if not is_guided(t, cfg_scale, guidance):
            return velocity(x, t, y)
        null = torch.full_like(y, sit.config.num_classes)
        cond, uncond = velocity(torch.cat([x, x]), t, torch.cat([y, null])).chunk(2)
        return uncond + cfg_scale * (cond - uncond)

    return field


def is_guided(t: torch.Tensor, cfg_scale: float, guidance: tuple[float, float]) -> bool:
    """Whether an evaluation at scalar time t runs both branches."""
    return cfg_scale != 1 and guidance[0] <= float(t) <= guidance[1]


def _euler_step(
    field: Field, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor
) -> torch.Tensor:
    return x + (t_next - t) * field(x, t)


def _heun_step(
    field: Field, x: torch.Tensor, t: torch.Tensor, t_next: torch.Tensor
) -> torch.Tensor:
    """Euler, corrected by the velocity where it lands; the last step, to t = 0, is left Euler."""
    v = field(x, t)
    x_next = x + (t_next - t) * v
    if t_next == 0:
        return x_next
    return x + (t_next - t) * 0.5 * (v + field(x_next, t_next))


def integrate_ab2(
    field: Field, x: torch.Tensor, times: torch.Tensor, guided: Sequence[bool]
) -> torch.Tensor:
    """Two-step Adams-Bashforth for unequal steps: one network call a step, second order.

    The first step is Euler's, and so is the one after `guided` changes: there the field jumps, and
    the velocity of the step before belongs to another field.
    """
    v_before, dt_before = None, None
    for k, (t, t_next) in enumerate(pairwise(times)):
        v, dt = field(x, t), t_next - t
        half = 0 if k == 0 or guided[k] != guided[k - 1] else dt / dt_before / 2
        x = x + dt * (v if half == 0 else (1 + half) * v - half * v_before)
        v_before, dt_before = v, dt
    return x


def integrate_sde(
    field: Field, x: torch.Tensor, times: torch.Tensor, path: str, generator: Generators
) -> torch.Tensor:
    """Euler-Maruyama: a stochastic step between each two of `times`, then one without to 0."""
    for t, t_next in pairwise(times):
        dt = t_next - t
        mean = x + dt * sde_drift(field(x, t), x, t, path)
        x = mean + (2 * t * dt.abs()).sqrt() * draw_like(x, generator)
    t = times[-1]
    return x - t * sde_drift(field(x, t), x, t, path)


def sde_drift(v: torch.Tensor, x: torch.Tensor, t: torch.Tensor, path: str) -> torch.Tensor:
    """v - w s / 2, (N, C, h, w), with the diffusion coefficient w(t) = 2 t and the score s at x.

    Affine in v: the drift of a guided velocity is the guided drift.
    """
    return v - t * score_from_velocity(v, x, t, path)


def draw_like(x: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Standard normal of x's shape and dtype, drawn on the device of the generator(s)."""
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, dtype=x.dtype, generator=generator, device=device).to(x.device)
    assert len(generator) == len(x), (len(generator), len(x))
    rows = [
        torch.randn(x.shape[1:], dtype=x.dtype, generator=g, device=g.device) for g in generator
    ]
    noise = torch.stack(rows)
    if x.is_cuda and not noise.is_cuda:  # a pageable copy would wait for the GPU to run dry
        noise = noise.pin_memory()
    return noise.to(x.device, non_blocking=True)
