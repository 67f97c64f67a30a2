"""Plot the error of the ODE solvers against the number of network calls: a figure of the docs.

    python scripts/plot_solvers.py --checkpoint exps/NAME --out FILE.png

Left: Gaussian data, whose velocity and solution are known in closed form. Right, with a checkpoint:
its EMA SiT, against a 500-step Heun solution from the same noise.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loss.interpolant import PATHS
from utils import cli
from utils.process import written
from utils.samplers import GUIDANCE_INTERVAL


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--out", type=cli.file_path, default=Path("assets/solvers.png"), help=".png to write")
    what = "a checkpoint, a run (its newest whole one), or OWNER/NAME[@REVISION] of the hub"
    add("--checkpoint", type=cli.file_path, help=what)
    add("--path", choices=PATHS, help="interpolant; default: that of the checkpoint")
    scale, time = (
        cli.number(float, at_least=0, at_most=1000),
        cli.number(float, at_least=0, at_most=1),
    )
    add("--cfg-scale", type=scale, default=1.0, help="classifier-free guidance; 1 = none")
    add("--guidance-high", type=time, default=GUIDANCE_INTERVAL[1], help="guide up to this t")
    num = cli.number(int, at_least=1, at_most=10_000)
    add("--num", type=num, default=16, help="latents of the checkpoint")
    args = parser.parse_args(argv)
    cli.check_output("--out", args.out, written.PICTURE, [args.checkpoint])
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from utils.pictures.solvers import REFERENCE_STEPS, checkpoint_curves, gaussian_curves, save_curves
from utils.sampling.locate import locate_checkpoint


def main() -> None:
    args = parse_args()
    folder = locate_checkpoint(args.checkpoint) if args.checkpoint else None
    panels = {"Gaussian data, exact solution": gaussian_curves()}
    if folder:
        guidance = (GUIDANCE_INTERVAL[0], args.guidance_high)
        curves = checkpoint_curves(folder, args.path, args.cfg_scale, guidance, args.num)
        name = folder.name if folder.is_relative_to(args.checkpoint) else str(args.checkpoint)
        panels[f"{name}, against Heun with {REFERENCE_STEPS} steps"] = curves
    save_curves(args.out, panels)
    for title, curves in panels.items():
        for solver, points in curves.items():
            print(title, solver, " ".join(f"{calls}:{error:.3g}" for calls, error in points))


if __name__ == "__main__":
    cli.run(main)
