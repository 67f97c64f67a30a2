"""Per-channel mean and std of any VAE's latents on any data.

    python scripts/vae_stats.py sdvae --data packed --path DIR --num 10000 --out stats.json

(z - mean) / std is what a SiT should see. Training measures them by itself when the starting VAE
brings none (latent_stats.json of the run); scripts/export_vae.py --data writes them into a VAE's
config.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.vae import load_vae
from utils import cli
from utils.checkpoint import versions, write_atomically
from utils.latent_stats import measure_latents
from utils.latents import weights_digest


def main() -> None:
    args = parse_args()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    source = cli.open_source_of(args)
    vae = load_vae(args.vae, args.vae_weights).eval().requires_grad_(False)
    num = min(args.num or len(source), len(source))
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = (v.tolist() for v in measure_latents(vae, source, num, args.seed))
    print(f"{args.vae}: latents of {num} of {len(source)} images at {args.resolution} px")
    print("channel      mean       std")
    for channel, (m, s) in enumerate(zip(mean, std)):
        print(f"{channel:7} {m:9.5f} {s:9.5f}")
    if args.out:
        facts = {"vae": args.vae, "vae_sha256": weights_digest(vae), "data": args.data}
        facts |= {"path": args.path, "split": args.split, "resolution": args.resolution}
        facts |= {"num_images": num, "seed": args.seed, "mean": mean, "std": std}
        write_atomically(args.out, json.dumps(facts | {"versions": versions()}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("vae", metavar="SPEC", help="short name, hub id, diffusers folder, checkpoint, or .pt")
    add("--vae-weights", default="hub", metavar="FILE", help="as vae.weights")
    cli.add_source_arguments(parser)
    add("--num", type=cli.positive, help="images to measure on; all")
    add("--seed", type=int, default=0, help="chooses the images, where they are not all")
    add("--out", type=Path, metavar="FILE.json", help="also write them here")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
