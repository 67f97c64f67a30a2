"""Error of the ODE solvers against the number of network calls: the figure of the README.

    python scripts/plot_solvers.py --checkpoint exps/NAME/checkpoints/0400000 --out FILE.png

Left: Gaussian data, whose velocity and solution are known in closed form. Right, with a checkpoint:
its EMA SiT, against a 500-step Heun solution from the same noise.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.errors import UserError
from models.sit import SiT
from utils import cli
from utils.draws import generator
from utils.samplers import sample

COLORS = {"ode-euler": "#b5502d", "ode-heun": "#7a7a7a", "ode-ab2": "#1f5fa8"}
STEPS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
REFERENCE_STEPS = 500


def main() -> None:
    args = parse_args()
    panels = {"Gaussian data, exact solution": analytic_panel()}
    if args.checkpoint:
        title = f"{args.checkpoint.name}, against Heun with {REFERENCE_STEPS} steps"
        panels[title] = checkpoint_panel(args)
    draw(panels, args.out)
    for title, curves in panels.items():
        for solver, points in curves.items():
            print(title, solver, " ".join(f"{calls}:{error:.3g}" for calls, error in points))


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets/solvers.png"))
    parser.add_argument("--checkpoint", type=Path, help="folder with sit_ema/")
    parser.add_argument("--path", choices=("linear", "cosine"), default="linear")
    parser.add_argument("--cfg-scale", type=float, default=1.0)
    parser.add_argument("--guidance-high", type=float, default=1.0)
    parser.add_argument("--num", type=int, default=16, help="images of the checkpoint")
    return parser.parse_args()


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


def analytic_panel() -> dict[str, list]:
    std = torch.linspace(0.2, 1.0, 4, dtype=torch.float64).view(4, 1, 1)
    noise = torch.randn(4, 4, 16, 16, generator=generator("plot"), dtype=torch.float64)
    field, y = GaussianField(0.5, std), torch.zeros(4, dtype=torch.int64)
    return measure(lambda **how: sample(field, noise, y, **how), 0.5 + std * noise)


def checkpoint_panel(args: argparse.Namespace) -> dict[str, list]:
    if not (args.checkpoint / "sit_ema").is_dir():
        raise UserError(f"--checkpoint {args.checkpoint} has no sit_ema/: name a checkpoint folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sit = SiT.from_pretrained(args.checkpoint / "sit_ema").to(device).eval()
    side, g = sit.config.input_size, generator("plot")
    noise = torch.randn(args.num, sit.config.in_channels, side, side, generator=g).to(device)
    y = torch.arange(args.num, device=device) % sit.config.num_classes
    guidance = {"cfg_scale": args.cfg_scale, "guidance": (0.0, args.guidance_high)}

    def solve(**how) -> Tensor:
        return sample(sit, noise, y, path=args.path, **guidance, **how)

    return measure(solve, solve(solver="ode-heun", steps=REFERENCE_STEPS))


def measure(solve: Callable, solution: Tensor) -> dict[str, list[tuple[int, float]]]:
    """Solver => (network calls, root mean square error) for each number of steps."""
    curves = {}
    for solver in COLORS:
        curves[solver] = []
        for steps in STEPS:
            error = (solve(solver=solver, steps=steps) - solution).square().mean().sqrt()
            calls = 2 * steps - 1 if solver == "ode-heun" else steps
            curves[solver].append((calls, float(error)))
    return curves


def draw(panels: dict[str, dict], out: Path) -> None:
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (title, curves) in zip(axes[0], panels.items()):
        for solver, points in curves.items():
            axis.loglog(*zip(*points), "o-", ms=4, color=COLORS[solver], label=solver)
        ticks = [4, 8, 16, 32, 64, 128, 256]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(title=title, xlabel="network calls", ylabel="RMS error of the latents")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(f"written to {out}")


if __name__ == "__main__":
    cli.run(main)
