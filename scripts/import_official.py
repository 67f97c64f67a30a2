"""Turn published weights into a checkpoint directory of this repository.

    python scripts/import_official.py 0400000.pt exps/published/0400000
    python scripts/import_official.py e2e-vavae.pt OUT --stats e2e-vavae-latents-stats.pt
    python scripts/import_official.py SiT-XL-2-256x256.pt OUT --vae sdvae --scaling-factor 0.18215 \
        --allow-learn-sigma slice

The first argument: a training checkpoint of REPA-E (with or without its VAE), or of REPA or SiT, a
bare SiT state dict, or a VAE. Nothing is executed from the pickle. Optimizers are left behind:
sampling, evaluation and `load_vae` work on the result, and it can give a run its initial weights.

The original SiT counts time the other way (t = 1 is data). Its weights are converted exactly;
a file with no trace of REPA is taken for one of them. DiT's own weights have the same keys and
shapes but predict noise: they can be initial weights, not samplers.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.discriminator import PatchGAN
from models.errors import UserError
from models.sit import SiT
from models.vae import VAE, load_vae
from utils import cli, official
from utils.checkpoint import Checkpoints, sha256_file

STATS_REMEDY = (
    "give --stats NAME-latents-stats.pt, or --scaling-factor (0.18215 for SiT and DiT releases)"
)


@dataclass
class Parts:
    """What goes into the directory; `sit` and `ema` are None for a VAE alone."""

    vae: VAE
    stats: tuple[Tensor, Tensor] | None
    sit: SiT | None = None
    ema: SiT | None = None
    disc: PatchGAN | None = None


def main() -> None:
    args = parse_args()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} exists and is not empty: choose another OUT_DIR, or delete it")
    published = official.read_published(args.checkpoint)
    notes = {"file": args.checkpoint.name, "sha256": sha256_file(args.checkpoint)}
    notes |= {"args": published.args}
    parts = assemble(args, published, notes)
    state = {"imported": True, "optimizer_state": None, "source": notes}
    state |= {"path": official.path_of(published.args, args.checkpoint)} if parts.ema else {}
    write(args.out, published.step, parts, state)
    for name in ("weights", "time", "vae", "latent_norm"):
        print(f"{name.replace('_', ' ')}: {notes.get(name, 'none')}")
    print(f"{args.out}: step {published.step}, without optimizer state")


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="published .pt (or .safetensors)")
    add("out", type=Path, metavar="OUT_DIR", help="checkpoint directory to write")
    add("--vae", help="VAE of a checkpoint without one: .pt, folder, hub id or short name")
    add("--stats", type=Path, help="NAME-latents-stats.pt, where the weights hold no latent norm")
    add("--scaling-factor", type=float, help="latents were multiplied by this; instead of --stats")
    add("--discriminator", type=Path, help="NAME-discriminator-ckpt.pt")
    add("--allow-learn-sigma", choices=("slice",), help="drop the variance half of the last layer")
    add("--num-heads", type=int, help="of a width that no published size has")
    add("--time", choices=("auto", "repa", "sit"), default="auto",
        help="t = 0 is data (repa) or t = 1 is data (sit: converted)")  # fmt: skip
    args = parser.parse_args()
    if args.stats and args.scaling_factor is not None:
        raise UserError("--stats and --scaling-factor exclude each other: give one")
    if args.scaling_factor is not None and not 0 < args.scaling_factor < float("inf"):
        raise UserError(f"--scaling-factor {args.scaling_factor} must be a positive number")
    return args


def assemble(args: argparse.Namespace, published: official.Published, notes: dict) -> Parts:
    """The networks, built and checked; `notes` is told where each came from."""
    weights = published.ema or published.model
    if weights is not None:  # before a VAE is loaded, which may take a while
        check_head(args, weights)
    vae, vae_file = find_vae(args, published, notes)
    disc = find_disc(args, published)
    stats, origin = find_stats(args, vae, vae_file)
    notes["latent_norm"] = origin
    if weights is None:
        return Parts(vae, stats, disc=disc)
    raw, ema = build_sits(args, published, stats, notes)
    if ema.config.in_channels != vae.latent_channels:
        raise UserError(
            f"{args.checkpoint} makes latents of {ema.config.in_channels} channels, the VAE "
            f"({notes['vae']}) decodes {vae.latent_channels}: give its own with --vae"
        )
    return Parts(vae, ema.bn.stats(), raw, ema, disc)


def check_head(args: argparse.Namespace, state: official.State) -> None:
    if official.predicts_sigma(state, args.checkpoint) and not args.allow_learn_sigma:
        raise UserError(
            f"{args.checkpoint} has a learn_sigma head (its last layer also predicts a variance): "
            "give --allow-learn-sigma slice to keep the velocity half"
        )


def find_vae(
    args: argparse.Namespace, published: official.Published, notes: dict
) -> tuple[VAE, Path | None]:
    """The VAE, and the file of its own that it came from, beside which statistics may lie."""
    if published.vae is not None:
        if args.vae:
            raise UserError(f"{args.checkpoint} holds its VAE: leave out --vae {args.vae}")
        notes["vae"] = args.checkpoint.name
        vae = official.build_official_vae(published.vae, f"vae of {args.checkpoint}")
        return vae, None if published.ema or published.model else args.checkpoint
    spec = args.vae or named_vae(args, published.args)
    notes["vae"] = spec
    path = Path(spec)
    if not path.is_file():
        return load_vae(spec), None
    found = official.read_published(path).vae
    if found is None:
        raise UserError(f"--vae {path} holds no VAE: expected encoder.* and decoder.* tensors")
    return official.build_official_vae(found, path), path


def named_vae(args: argparse.Namespace, settings: dict) -> str:
    """args.vae_ckpt of an LDM-only checkpoint: there, or beside the checkpoint. A file only: what
    a checkpoint says must not start a download."""
    named = settings.get("vae_ckpt")
    if not named:
        raise UserError(f"{args.checkpoint} holds no VAE and names none: give --vae")
    for path in (Path(named), args.checkpoint.parent / Path(named).name):
        if path.is_file():
            return str(path)
    raise UserError(
        f"{args.checkpoint} names the VAE {named}, which is neither there nor beside the "
        "checkpoint: give --vae"
    )


def find_disc(args: argparse.Namespace, published: official.Published) -> PatchGAN | None:
    state, origin = published.discriminator, f"discriminator of {args.checkpoint}"
    if args.discriminator:
        if state is not None:
            raise UserError(f"{args.checkpoint} holds a discriminator: leave out --discriminator")
        content = official.unpickle(args.discriminator)
        content = content.get("discriminator", content.get("state_dict", content))
        state, origin = official.tensors(content, args.discriminator), args.discriminator
    return None if state is None else official.build_official_disc(state, origin)


def find_stats(
    args: argparse.Namespace, vae: VAE, vae_file: Path | None
) -> tuple[tuple[Tensor, Tensor] | None, str]:
    """((mean, std) of the latents or None, where they come from), beside the SiT's own."""
    beside = vae_file and vae_file.with_name(f"{vae_file.stem}-latents-stats.pt")
    channels = vae.latent_channels
    if args.scaling_factor is not None:
        std = torch.full((channels,), 1 / args.scaling_factor)
        return (torch.zeros(channels), std), f"--scaling-factor {args.scaling_factor}"
    path = args.stats or (beside if beside and beside.is_file() else None)
    if path is None:
        known = vae.latent_stats()
        return known, "config of the VAE" if known else "none"
    stats = official.read_stats(path)
    if len(stats[0]) != channels:
        raise UserError(f"--stats {path} is of {len(stats[0])} channels, the VAE has {channels}")
    return stats, str(path)


def build_sits(
    args: argparse.Namespace,
    published: official.Published,
    stats: tuple[Tensor, Tensor] | None,
    notes: dict,
) -> tuple[SiT, SiT]:
    """Raw and EMA network; one file that has only one of them gives both."""
    raw = published.model or published.ema
    ema = published.ema or published.model
    has_bn = any(key.startswith("bn.") for key in ema)
    if not has_bn and stats is None:
        raise UserError(f"{args.checkpoint} holds no latent norm, nor does its VAE: {STATS_REMEDY}")
    if has_bn:
        notes["latent_norm"] = "bn.* of the checkpoint"
    notes["weights"] = "model and ema" if published.model and published.ema else "one set, as both"
    reverse = args.time == "sit" or (args.time == "auto" and official.is_original_sit(published))
    notes["time"] = "t = 1 was data (original SiT): converted" if reverse else "t = 0 is data"
    config = official.sit_config(ema, published.args, args.num_heads, args.checkpoint)
    config["latent_norm"] = "batch" if published.vae else "fixed"
    nets = []
    for name, state in (("model", raw), ("ema", ema)):
        origin = f"{name} of {args.checkpoint}"
        if official.predicts_sigma(state, origin):
            state = official.without_sigma(state)
        state = official.reverse_time(state, origin) if reverse else state
        nets.append(official.build_official_sit(state, config, None if has_bn else stats, origin))
    return tuple(nets)


def write(out: Path, step: int, parts: Parts, state: dict) -> None:
    """Fill a checkpoint beside `out`, seal it, rename it."""

    def fill(folder: Path) -> None:
        parts.vae.save(folder / "vae", *(parts.stats or ()))
        if parts.ema:
            parts.sit.save_pretrained(folder / "sit")
            parts.ema.save_pretrained(folder / "sit_ema")
        if parts.disc:
            save_file(parts.disc.state_dict(), folder / "discriminator.safetensors")

    out = out.resolve()
    draft = out.parent / f".tmp-{out.name}"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        Checkpoints(draft).save(step, fill, state).rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


if __name__ == "__main__":
    cli.run(main)
