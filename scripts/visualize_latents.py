"""Pictures of what training does to latents, and to samples.

    python scripts/visualize_latents.py latents --vae sdvae TUNED=exps/NAME/checkpoints/0400000 \\
        --data folder --path DIR --out latents.png
    python scripts/visualize_latents.py progress --run exps/NAME --out progress.png

`latents` draws a column for each image. The first row shows the images; each further row shows the
latents of one VAE (posterior means), their first three principal components as red, green and blue
(utils/pictures/pca.py). The colours come from a basis (normalisation, axes, colour range), which is
fitted on --fit images. --basis says on which latents:

  own      each VAE has its own basis; colours of different rows cannot be compared
  shared   one basis, fitted on the latents of all VAEs together
  first    the basis of the first VAE for all rows: shows what tuning has changed

The label of a row gives the shape of its latents, and the share of their variance on each axis.

`progress` draws a row for each checkpoint (its EMA weights, its own VAE) and a column for each
sample. Image i is the one that sample_ddp.py makes with the same settings.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli
from utils.data.registry import add_source_arguments, open_source_of
from utils.process import written
from utils.sampling.settings import SamplingSettings, add_classes, check_classes

MOST_COLUMNS = 200  # a wider picture cannot be drawn


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="latents | progress")

    command = commands.add_parser("latents", help="PCA of the latents of one or several VAEs")
    add = command.add_argument
    add("--vae", type=cli.path, nargs="+", required=True, metavar="[LABEL=]SPEC",
        help="short name, checkpoint, run, diffusers folder, hub id or weight file")  # fmt: skip
    add_source_arguments(command)
    columns = cli.number(int, at_least=1, at_most=MOST_COLUMNS)
    add("--num", type=columns, default=8, help="images shown, evenly spread over the source")
    add("--fit", type=cli.positive, default=256, help="images a basis is fitted on, evenly spread")
    add(
        "--basis",
        choices=("own", "shared", "first"),
        default="own",
        help="latents that the colours are fitted on",
    )
    add("--reconstructions", action="store_true", help="also a row of them for each VAE")
    add("--out", type=cli.file_path, required=True, help=".png to write")

    command = commands.add_parser("progress", help="samples of checkpoints from the same noise")
    add = command.add_argument
    what = "exps/NAME/checkpoints/0400000, a run (its newest one), OWNER/NAME of the hub, ..."
    add("checkpoint", type=cli.file_path, nargs="*", help=what)
    add("--run", type=cli.file_path, action="append", default=[], metavar="exps/NAME",
        help="all its whole checkpoints, by step; may be given several times")  # fmt: skip
    add("--num", type=columns, default=8, help="images of each: 0, 1, ... of sample_ddp.py")
    add_classes(command)
    own = {"solver": "ode-ab2", "steps": 50, "cfg_scale": 2.0, "batch_size": 16}
    SamplingSettings.add_arguments(command, **own)
    add("--out", type=cli.file_path, required=True, help=".png to write")

    args = parser.parse_args(argv)
    if args.command == "latents":
        inputs = [args.path, *(spec.rpartition("=")[2] for spec in args.vae)]
    else:
        inputs = [*args.checkpoint, *args.run]
    cli.check_output("--out", args.out, written.PICTURE, inputs)
    if args.command == "progress":
        check_classes(args)
        SamplingSettings.from_args(args)
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from utils.data.base import describe
from utils.pictures.grid import save_grid_of_rows
from utils.pictures.latents import latent_rows
from utils.pictures.progress import progress_rows


def main() -> None:
    args = parse_args()
    if args.command == "latents":
        source = open_source_of(args)
        print("\n".join([describe(source), *source.notes]))
        rows = latent_rows(source, args.vae, args.num, args.fit, args.basis, args.reconstructions)
        save_grid_of_rows(args.out, rows)
    else:
        settings = SamplingSettings.from_args(args)
        chosen = (args.checkpoint, args.run, settings, args.num, args.classes)
        save_grid_of_rows(args.out, *progress_rows(*chosen))


if __name__ == "__main__":
    cli.run(main)
