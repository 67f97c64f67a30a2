"""Error of each ODE solver against its number of network calls: the picture of plot_solvers.py."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loss.interpolant import PATHS
from models.sit import load_sit
from utils.checkpoint import SIT_EMA
from utils.distributed import default_device
from utils.pictures.grid import save_figure
from utils.random import generator
from utils.samplers import SOLVERS, network_calls, ode_times, sample
from utils.sampling.load import open_checkpoint
from utils.sampling.settings import SamplingSettings

STEPS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
REFERENCE_STEPS = 500  # of Heun, where no exact solution is known

# Solver => (network calls, root mean square error) for each number of steps.
Curves = dict[str, list[tuple[int, float]]]


class GaussianField(torch.nn.Module):
    """Velocity of the linear path for data N(mean, std^2) in each coordinate, std (C, h, w).

    x_t = (1 - t) z + t eps is normal, and its flow carries noise e to mean + std e.
    """

    def __init__(self, mean: float, std: Tensor):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list]:
        t = t.view(-1, 1, 1, 1)
        slope = (t - (1 - t) * self.std**2) / ((1 - t) ** 2 * self.std**2 + t**2)
        return slope * (x - (1 - t) * self.mean) - self.mean, []


def gaussian_curves() -> Curves:
    """Errors for Gaussian data, whose velocity and solution are known in closed form."""
    return measure(gaussian_error)


def gaussian_error(solver: str, steps: int) -> float:
    """Root mean square error of the latents of Gaussian data, by the exact solution."""
    std = torch.linspace(0.2, 1.0, 4, dtype=torch.float64).view(4, 1, 1)
    noise = torch.randn(4, 4, 16, 16, generator=generator("plot"), dtype=torch.float64)
    field, y = GaussianField(0.5, std), torch.zeros(4, dtype=torch.int64)
    return rms(sample(field, noise, y, solver=solver, steps=steps) - (0.5 + std * noise))


def rms(error: Tensor) -> float:
    """Root mean square."""
    return float(error.square().mean().sqrt())


def checkpoint_curves(
    checkpoint: Path,
    path: str | None,
    cfg_scale: float,
    guidance: tuple[float, float],
    num: int,
) -> Curves:
    """Errors for the EMA SiT of a checkpoint, against Heun with `REFERENCE_STEPS` steps from the
    same noise, averaged over `num` latents. `path`: the interpolant; None: the checkpoint's."""
    settings = SamplingSettings(path=path, cfg_scale=cfg_scale)
    path = open_checkpoint(checkpoint, settings).settings.path or PATHS[0]
    device = default_device()
    sit: Any = load_sit(checkpoint / SIT_EMA)
    sit.to(device)
    side, g = sit.config.input_size, generator("plot")
    noise = torch.randn(num, sit.config.in_channels, side, side, generator=g).to(device)
    y = torch.arange(num, device=device) % sit.config.num_classes
    solve = partial(sample, sit, noise, y, path=path, cfg_scale=cfg_scale, guidance=guidance)
    solution = solve(solver="ode-heun", steps=REFERENCE_STEPS)
    return measure(lambda solver, steps: rms(solve(solver=solver, steps=steps) - solution))


def measure(error: Callable[[str, int], float]) -> Curves:
    """`error(solver, steps)` of each solver with each number of steps."""
    return {
        solver: [(network_calls(solver, steps), error(solver, steps)) for steps in STEPS]
        for solver, row in SOLVERS.items()
        if row.times is ode_times  # the SDE has no one solution
    }


def save_curves(path: Path, panels: dict[str, Curves]) -> None:
    """One panel for each title, with logarithmic axes, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    ticks = [4, 8, 16, 32, 64, 128, 256]
    for axes, (title, curves) in zip(all_axes, panels.items()):
        for solver, points in curves.items():
            axes.loglog(*zip(*points), "o-", ms=4, label=solver)
        axes.set_xticks(ticks, [*map(str, ticks)])
        axes.minorticks_off()
        axes.set(title=title, xlabel="network calls", ylabel="RMS error of the latents")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    save_figure(figure, path, dpi=150)
    print(f"written to {path}")
