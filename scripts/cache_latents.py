"""Encode a data set once, so that a SiT on a frozen VAE trains without running the VAE.

Example:

    accelerate launch scripts/cache_latents.py --vae sdvae --data packed --path DIR --out CACHE
    accelerate launch train_repae.py --config CONFIG vae.train=false data.latents=CACHE

Mean and std of the posteriors are kept, so that every step draws its own latents; with --encoders
also the tokens of frozen encoders, for encoder.cached=true. After an interruption the same command
continues. The layout of CACHE is described in utils/data/latents.py.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.backbones.names import canonical
from models.checks.errors import UserError
from utils import cli
from utils.data.registry import add_source_arguments, open_source_of


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--vae", type=cli.path, required=True, metavar="SPEC", help="as vae.name: short name, "
        "hub id, checkpoint, run, folder or weight file")  # fmt: skip
    add("--vae-weights", type=cli.path, default="hub", metavar="FILE", help="as vae.weights")
    add_source_arguments(parser)
    add("--out", type=cli.file_path, required=True, metavar="CACHE", help="folder to write")
    add("--hflip", action="store_true", help="also the mirrored images, for data.hflip=true")
    add("--encoders", nargs="+", default=[], metavar="NAME", help="also cache their tokens")
    add("--encoder-weights", type=cli.path, nargs="+", default=[], metavar="FILE", help="a file "
        "for each encoder; default: the published weights")  # fmt: skip
    add("--encoder-grid", type=cli.positive, metavar="N", help="tokens per side of the image; "
        "default: resolution / 16")  # fmt: skip
    add("--precision", choices=("bf16", "fp16", "fp32"), default="fp32", help="of the networks; "
        "fp32 uses TF32 on GPUs. The cache is float16 in any case")  # fmt: skip
    add("--batch-size", type=cli.positive, default=32, help="images per rank and network call")
    add("--shard-size", type=cli.positive, default=4096, help="images; a kill costs each rank one "
        "shard at most")  # fmt: skip
    add("--workers", type=cli.not_negative, default=8, help="loader processes per rank")
    add("--dry-run", action="store_true", help="check, print the disk space needed, and stop")
    args = parser.parse_args(argv)
    given = len(args.encoder_weights)
    if given not in (0, len(args.encoders)):
        raise UserError(f"--encoder-weights has {given} files for {len(args.encoders)} --encoders")
    args.encoders = [canonical(name) for name in args.encoders]
    args.encoder_weights = args.encoder_weights or [None] * len(args.encoders)
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

import torch

from models.encoders import encoder_shape, encoder_weight_file, load_encoder
from models.vae import build_vae, load_vae, vae_weight_file
from utils.data.base import cautions, describe
from utils.data.latent_writer import CacheWriter
from utils.data.latents import cache_rows, weights_id
from utils.data.sharded import ShardedFolder
from utils.distributed import Ranks
from utils.files import check_disk
from utils.precision import allow_tf32, effective_precision, emulation_note
from utils.sampling.locate import locate_vae_spec


def main() -> None:
    args = parse_args()
    ranks = Ranks()
    allow_tf32(True)
    if note := emulation_note(args.precision, ranks.device):
        ranks.print(f"--precision {args.precision}: {note}")
        args.precision = effective_precision(args.precision, ranks.device)
    inputs = [args.path, args.vae, args.vae_weights, *args.encoder_weights]
    cli.check_output_folder("--out", args.out, inputs)
    args.vae = ranks.on_main(lambda: locate_vae_spec(args.vae))
    source = open_source_of(args)
    args.resolution = source.resolution  # that of packed data, if none was given
    folder = cache_folder(args, len(source))
    for line in (describe(source), *cautions(source), folder.describe()):
        ranks.print(line)
    ranks.on_main(lambda: folder.check_plan(("copies", "latent_shape", "resolution", "precision")))
    ranks.on_main(lambda: check_disk(args.out, folder.bytes_to_write()))
    if args.dry_run:
        return ranks.on_main(lambda: check_weights(args))
    vae, encoders = ranks.main_first(lambda: load(args, ranks.device))
    writer = CacheWriter(folder, source, vae, encoders, args.precision)
    with ExitStack() as stack:
        todo = ranks.on_main(lambda: stack.enter_context(writer.begin()))
        share = todo[ranks.rank :: ranks.world]
        writer.write(share, args.batch_size, args.workers, progress=ranks.is_main)
        ranks.wait()
        ranks.on_main(lambda: writer.finish(args.vae))
    features = " encoder.cached=true" if args.encoders else ""
    used = f"vae.train=false data.latents={args.out}{features}"
    ranks.print(f"cached {len(source)} images; use: {used}")


def cache_folder(args: argparse.Namespace, num_images: int) -> ShardedFolder:
    """The folder to fill; nothing is written yet. Needs no weights."""
    with torch.device("meta"):
        latent = build_vae(args.vae).latent_shape(args.resolution)
    plan = {"copies": 1 + args.hflip, "latent_shape": list(latent), "encoders": []}
    for name, file in zip(args.encoders, args.encoder_weights):
        grid, dim = encoder_shape(name, args.resolution, args.encoder_grid)
        entry = {"name": name, "shape": [grid**2, dim], "weights": weights_id(name, file)}
        plan["encoders"].append(entry)
    plan |= {"resolution": args.resolution, "precision": args.precision}
    shards = {"num_items": num_images, "shard_size": args.shard_size}
    return ShardedFolder(args.out, plan=plan, rows=cache_rows(plan), **shards)


def check_weights(args: argparse.Namespace) -> None:
    """`UserError` if a weight file is not there or does not fit; those that would be downloaded are
    not looked at."""
    file = vae_weight_file(args.vae, args.vae_weights)
    if file and file.find():
        load_vae(args.vae, args.vae_weights)
    for name, given in zip(args.encoders, args.encoder_weights):
        file = encoder_weight_file(name, given)
        if file and file.find():
            load_encoder(name, given, args.resolution, args.encoder_grid)


def load(args: argparse.Namespace, device: torch.device) -> tuple:
    """The VAE and the encoders, frozen, on the device."""
    encoders = [
        load_encoder(name, file, args.resolution, args.encoder_grid).to(device)
        for name, file in zip(args.encoders, args.encoder_weights)
    ]
    return load_vae(args.vae, args.vae_weights).to(device).eval().requires_grad_(False), encoders


if __name__ == "__main__":
    cli.run(main)
