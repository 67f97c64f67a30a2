"""Measure the mean and std of each channel of a VAE's latents, on any data.

Example:

    python scripts/vae_stats.py sdvae --data packed --path DIR --num 10000 --out stats.json

A SiT should see (z - mean) / std. Training measures these numbers by itself when the starting VAE
has none (latent_stats.json of the run); scripts/export_vae.py --data writes them into the config of
a VAE.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli
from utils.data.registry import add_source_arguments, open_source_of
from utils.process import written


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("vae", type=cli.path, metavar="SPEC", help="as vae.name: short name, hub id, "
        "checkpoint, run, folder or weight file")  # fmt: skip
    add("--vae-weights", type=cli.path, default="hub", metavar="FILE", help="as vae.weights")
    add_source_arguments(parser)
    add("--num", type=cli.positive, help="number of images to measure on; default: all")
    add("--seed", type=cli.not_negative, default=0, help="chooses the images if not all are taken")
    add("--out", type=cli.file_path, metavar="FILE.json", help="also write the numbers to a file")
    args = parser.parse_args(argv)
    if args.out:
        inputs = (args.vae, args.vae_weights, args.path)
        cli.check_output("--out", args.out, written.LATENT_STATS, inputs)
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from models.vae import load_vae
from utils.data.latent_stats import measure_latents
from utils.data.latents import weights_digest
from utils.distributed import default_device
from utils.files import write_json
from utils.provenance import versions
from utils.sampling.locate import locate_vae_spec


def main() -> None:
    args = parse_args()
    source = open_source_of(args)
    vae = load_vae(locate_vae_spec(args.vae), args.vae_weights).to(default_device())
    vae.eval().requires_grad_(False)
    num = min(args.num or len(source), len(source))
    mean, std = (values.tolist() for values in measure_latents(vae, source, num, args.seed))
    print(f"{args.vae}: latents of {num} of {len(source)} images at {source.resolution} px")
    for note in source.notes:
        print(f"note: {note}")
    print("channel      mean       std")
    for channel, (m, s) in enumerate(zip(mean, std)):
        print(f"{channel:7} {m:9.5f} {s:9.5f}")
    if args.out:
        facts = {"vae": args.vae, "vae_sha256": weights_digest(vae), "data": args.data}
        facts |= {"path": args.path, "split": args.split, "resolution": source.resolution}
        facts |= {"num_images": num, "seed": args.seed, "mean": mean, "std": std}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, facts | {"versions": versions()})


if __name__ == "__main__":
    cli.run(main)
