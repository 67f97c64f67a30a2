r"""Write the VAE of a checkpoint, or one of somebody else, as a plain diffusers folder.

    python scripts/export_vae.py exps/NAME my-vae --data packed --path DIR \
        --evaluation vae.json

OUT holds the weights, a config.json with per-channel latents_mean and latents_std (scaling_factor
1, shift_factor 0), the discriminator if the checkpoint has one, and a model card (README.md).

The latent statistics in a checkpoint of joint training are running averages, which lag behind the
VAE's last weights. `--data` measures them anew, with these very weights.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.checks.errors import UserError
from utils import cli
from utils.data.registry import add_source_arguments, open_source_of


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    what = "a checkpoint, a run (its newest whole one), or whatever vae.name takes"
    cli.add_export_arguments(parser, what, "evaluate_fid.py --vae --out")
    add_source_arguments(parser, required=False)
    add = parser.add_argument
    add("--num", type=cli.positive, default=4096, metavar="N", help="images for the statistics")
    what = "chooses the images"
    add("--seed", type=cli.not_negative, default=0, metavar="N", help=what)
    args = parser.parse_args(argv)
    cli.check_output_folder("OUT", args.out, [args.checkpoint, args.path])
    if args.path and not args.data:
        raise UserError(f"--path {args.path} needs --data, which says what is there")
    for name in ("num", "seed", "resolution", "split"):
        if not args.data and getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name} {getattr(args, name)} needs --data, which is to be measured")
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the import below, which takes seconds

from utils.published.exporting import export_vae, upload


def main(argv=None) -> None:
    args = parse_args(argv)
    split = f" ({args.split} split)" if args.data == "digits" else ""
    origin = export_vae(
        args.checkpoint,
        args.out,
        images=open_source_of(args) if args.data else None,
        images_name=f"{args.data}{split}",
        num_images=args.num,
        seed=args.seed,
        evaluation=args.evaluation,
        title=args.push_to_hub,
    )
    print(f"{args.out} written. Latent statistics: {origin}.")
    if args.push_to_hub:
        upload(args.out, args.push_to_hub)


if __name__ == "__main__":
    cli.run(main)
