r"""Turn published weights into a checkpoint directory of this repository.

    python scripts/import_official.py 0400000.pt exps/published/0400000
    python scripts/import_official.py e2e-vavae.pt OUT_DIR --stats e2e-vavae-latents-stats.pt
    python scripts/import_official.py SiT-XL-2-256x256.pt OUT_DIR --vae sdvae \
        --scaling-factor 0.18215 --allow-learn-sigma slice

The first argument is a training checkpoint of REPA-E (with or without its VAE), REPA, iREPA or SiT,
a state dict of their SiT, a VAE, or a folder of accelerate or diffusers with one of these. What is
wrapped around the tensors (ema, module., _orig_mod., state_dict, ...) is looked through. No code
that a pickle holds is executed. Optimizers are not imported. Sampling, evaluation and `load_vae`
work on OUT_DIR, and run.init_from=OUT_DIR starts a training run from its weights.

The original SiT counts time the other way (t = 1 is data): its weights are converted exactly. Which
way a file counts is taken from what proves it: projectors, latent norm, settings. An EMA that is
shared without them proves nothing: say it with --time. A DiT has SiT's names and shapes, but
predicts noise: known by its name, it can start a run, and is refused by sample_ddp.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.checks.errors import UserError
from utils import cli


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=cli.file_path, metavar="CKPT", help="published file or folder")
    add("out", type=cli.file_path, metavar="OUT_DIR", help="checkpoint directory to write; new")
    add(
        "--vae",
        type=cli.path,
        help="VAE of a checkpoint without one, as vae.name",
    )
    stats_help = "NAME-latents-stats.pt, where the weights hold no latent norm"
    add("--stats", type=cli.file_path, metavar="FILE", help=stats_help)
    add("--scaling-factor", type=float, metavar="X", help="instead of --stats: the latents' factor")
    add("--discriminator", type=cli.file_path, metavar="FILE", help="NAME-discriminator-ckpt.pt")
    add("--allow-learn-sigma", choices=("slice",), help="drop the variance half of the last layer")
    add("--num-heads", type=cli.positive, metavar="N", help="for widths that no published size has")
    time_help = "repa: t = 0 is data; sit: t = 1 is data, to be converted; auto: as the file proves"
    add("--time", choices=("auto", "repa", "sit"), default="auto", help=time_help)
    args = parser.parse_args(argv)
    cli.check_output_folder("OUT_DIR", args.out, [args.vae])
    if args.stats and args.scaling_factor is not None:
        raise UserError("--stats and --scaling-factor exclude each other: give one")
    if args.scaling_factor is not None and not 1e-6 <= args.scaling_factor <= 1e6:
        given = args.scaling_factor
        raise UserError(f"--scaling-factor {given} must be a positive number, 1e-6 to 1e6")
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the import below, which takes seconds

from utils.published.importing import import_published


def main(argv=None) -> None:
    args = parse_args(argv)
    state = import_published(**vars(args))
    for name in ("weights", "time", "interpolant", "projectors", "vae", "latent_norm"):
        print(f"{name.replace('_', ' ')}: {state['source'].get(name, 'none')}")
    if state["source"].get("predicts"):
        print("warning: a DiT predicts noise: samples are refused, run.init_from takes it")
    print(f"{args.out}: step {state['step']}, without optimizer state")


if __name__ == "__main__":
    cli.run(main)
