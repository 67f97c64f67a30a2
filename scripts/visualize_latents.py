"""Pictures of what training does to latents, and to samples.

    python scripts/visualize_latents.py latents --vae sdvae TUNED=exps/NAME/checkpoints/0400000 \
        --data folder --path DIR --out latents.png
    python scripts/visualize_latents.py progress --run exps/NAME --out progress.png

`latents`: a column for each image; a row of the images, then one for each VAE: the posterior mean,
its first three principal components as RGB (utils/pca.py), one square for each latent pixel. A
basis, which is normalisation, axes and colour range, is fitted on --fit images. `own`: each VAE has
its own; colours cannot be compared between rows. `shared`: one of all VAEs' latents together;
`first`: that of the first VAE, so that what tuning changed shows. In both a colour means the same
latent in every row, as far as three components tell. Below a name stand the latents' shape and the
share of their (normalised) variance along each axis; more figures are printed.

`progress`: a row for each checkpoint, its EMA weights and its own VAE; a column for each index, the
same label everywhere, and the same noise wherever latents have the same shape. Image i is what
`sample_ddp.py` makes of the same settings.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample_ddp
from models.errors import UserError
from models.vae import build_vae, load_vae
from utils import cli
from utils.checkpoint import STATE, Checkpoints
from utils.data import Source
from utils.generate import Sampling, draw_images, draw_labels
from utils.images import pm1_to_u8, u8_to_pm1
from utils.labelled_grid import Row, draw_grid
from utils.metrics import LatentStatistics
from utils.pca import Basis, fit_basis, to_rows
from utils.shards import read_record

CHUNK = 16  # images encoded, or sampled, at a time


def main() -> None:
    args = parse_args()
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out} must end in .png")
    picture = args.draw(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(args.out)
    print(f"written to {args.out}: {picture.width} x {picture.height}")


def parse_args() -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="latents | progress")
    add_latents(commands.add_parser("latents", help="PCA of the latents of one or several VAEs"))
    add_progress(commands.add_parser("progress", help="samples of checkpoints from the same noise"))
    return parser.parse_args()


def add_latents(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(draw=draw_latents)
    add = parser.add_argument
    add("--vae", nargs="+", required=True, metavar="[LABEL=]SPEC",
        help="short name, checkpoint, diffusers folder, hub id or weight file")  # fmt: skip
    cli.add_source_arguments(parser)
    add("--num", type=cli.positive, default=8, help="images shown, evenly spread over the source")
    add("--fit", type=cli.positive, default=256, help="images a basis is fitted on, likewise")
    add("--basis", choices=("own", "shared", "first"), default="own")
    add("--reconstructions", action="store_true", help="also a row of them for each VAE")
    add("--out", type=Path, required=True, help=".png to write")


def add_progress(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(draw=draw_progress, path=None, uint8="round", decode_batch_size=CHUNK)
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="*", help="exps/NAME/checkpoints/0400000 ...")
    add("--run", type=Path, action="append", default=[], metavar="exps/NAME",
        help="all its whole checkpoints, by step; may be given several times")  # fmt: skip
    add("--num", type=cli.positive, default=8, help="images of each: 0, 1, ... of sample_ddp.py")
    sample_ddp.add_sampling_arguments(parser)
    parser.set_defaults(solver="ode-ab2", steps=50, cfg_scale=2.0)
    add("--out", type=Path, required=True, help=".png to write")


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --------------------------------------------------------------------------------------
# Latents.


class Encoded(NamedTuple):
    """What one VAE made of the images."""

    label: str
    z: Tensor  # (N, C, h, w) float32 of the images shown
    fit: Tensor  # (M, C, h, w) of those that a basis is fitted on
    x_hat_u8: Tensor | None  # (N, 3, H, W)


def draw_latents(args: argparse.Namespace) -> Image.Image:
    source = cli.open_source_of(args)
    specs = [split_label(word) for word in args.vae]
    check_channels(specs, args.resolution, args.basis)
    encoded = [encode(label, spec, source, args) for label, spec in specs]
    images = torch.stack([source[i][0] for i in spread(len(source), args.num)])
    rows = [Row("images", [f"{args.resolution} px"], images)]
    for e, basis in zip(encoded, choose_bases([e.fit for e in encoded], args.basis)):
        shares = basis.explained(to_rows(e.fit)).tolist()
        print_figures(e, shares)
        percent = " + ".join(f"{100 * share:.0f}" for share in shares)
        rows.append(Row(e.label, [shape_of(e), f"{percent} %"], basis.colours(e.z)))
        if e.x_hat_u8 is not None:
            rows.append(Row(e.label, ["reconstruction"], e.x_hat_u8))
    return draw_grid(rows)


def split_label(word: str) -> tuple[str, str]:
    """[LABEL=]SPEC => label, spec. A `=` in the name of a file or folder makes no label."""
    label, equals, spec = word.partition("=")
    if equals and label and spec and not Path(word).exists():
        return label, spec
    return " ".join(name_of(Path(word))), word


def name_of(path: Path) -> list[str]:
    """What tells a checkpoint or VAE folder from others: ["NAME", "0400000"], or ["my-vae"]."""
    parts = [p for p in path.absolute().parts if p not in ("vae", "checkpoints")]
    return parts[-2:] if parts[-1].isdigit() else parts[-1:]


def check_channels(specs: list[tuple[str, str]], resolution: int, basis: str) -> None:
    """Raise `UserError` before anything is encoded."""
    with torch.device("meta"):
        channels = [build_vae(spec).latent_shape(resolution)[0] for _, spec in specs]
    if basis != "own" and len(set(channels)) > 1:
        found = ", ".join(f"{label} {c}" for (label, _), c in zip(specs, channels))
        raise UserError(
            f"--basis {basis} needs VAEs of equally many latent channels, not {found}: take "
            "--basis own, or draw them apart"
        )


def spread(total: int, num: int) -> list[int]:
    """Indices of `num` of `total` images at equal distances; all if there are fewer."""
    num = min(num, total)
    return [i * total // num for i in range(num)]


@torch.no_grad()
def encode(label: str, spec: str, source: Source, args: argparse.Namespace) -> Encoded:
    vae, device = load_vae(spec).eval().to(choose_device()), choose_device()

    def means(num: int) -> Tensor:
        parts = []
        for some in torch.tensor(spread(len(source), num)).split(CHUNK):
            x_u8 = torch.stack([source[int(i)][0] for i in some])
            parts.append(vae.encode(u8_to_pm1(x_u8).to(device)).mean.cpu())
        return torch.cat(parts)

    z, fit, x_hat_u8 = means(args.num), means(args.fit), None
    if not (z.isfinite().all() and fit.isfinite().all()):
        raise UserError(f"--vae {spec}: its latents are not finite; take other weights")
    if args.reconstructions:
        decoded = [pm1_to_u8(vae.decode(some.to(device))) for some in z.split(CHUNK)]
        x_hat_u8 = torch.cat(decoded).cpu()
    return Encoded(label, z, fit, x_hat_u8)


def choose_bases(fits: list[Tensor], kind: str) -> list[Basis]:
    """One for each VAE, given its latents (M, C, h, w)."""
    if kind == "own":
        return [fit_basis(to_rows(z)) for z in fits]
    rows = to_rows(fits[0]) if kind == "first" else torch.cat([to_rows(z) for z in fits])
    return [fit_basis(rows)] * len(fits)


def print_figures(e: Encoded, shares: list[float]) -> None:
    """Explained variance, and the two scalars of the paper's Table 10, which scale with the
    latents: hence once more without their scale."""
    std = to_rows(e.fit).std(0, correction=0).clamp(min=1e-12).view(1, -1, 1, 1)
    print(f"{e.label}: {len(e.fit)} latents of {shape_of(e)}")
    each = " + ".join(f"{share:.1%}" for share in shares)
    print(f"  variance explained by the three axes: {each} = {sum(shares):.1%}")
    for what, z in (("as they are", e.fit), ("channels divided by their std", e.fit / std)):
        statistics = LatentStatistics(z.shape[1])
        statistics.add(z)
        found = statistics.result()
        variance, variation = found["spatial_variance"], found["total_variation"]
        print(f"  spatial variance {variance:.4g}, total variation {variation:.4g} ({what})")


def shape_of(e: Encoded) -> str:
    return " x ".join(map(str, e.z.shape[1:]))


# --------------------------------------------------------------------------------------
# Progress.


def draw_progress(args: argparse.Namespace) -> Image.Image:
    checkpoints = find_checkpoints(args)
    commands = [sample_command(args, folder) for folder in checkpoints]
    settings = [sample_ddp.resolve(command) for command in commands]  # fills in command.path
    num_classes = {s["num_classes"] for s in settings}
    if len(num_classes) > 1:
        found = ", ".join(map(str, sorted(num_classes)))
        raise UserError(f"these checkpoints know {found} classes: labels cannot be shared")
    several = len({name_of(folder)[0] for folder in checkpoints}) > 1
    rows = []
    for command in commands:
        rows.append(Row(*titles(command.checkpoint, several), draw_samples(command)))
        print(f"sampled {command.checkpoint}")
    y = draw_labels(sample_ddp.sampling(commands[0]), range(args.num), *num_classes)
    return draw_grid(rows, [f"class {label}" for label in y.tolist()])


def find_checkpoints(args: argparse.Namespace) -> list[Path]:
    """Those given, in their order, then those of each run, by step."""
    found = list(args.checkpoint)
    for run in args.run:
        whole = Checkpoints(run).whole()
        if not whole:
            raise UserError(f"--run {run}: no whole checkpoint in {run / 'checkpoints'}")
        found += whole
    if not found:
        raise UserError("name checkpoints like exps/NAME/checkpoints/0400000, or --run exps/NAME")
    return found


def sample_command(args: argparse.Namespace, checkpoint: Path) -> argparse.Namespace:
    """The arguments of the `sample_ddp.py` that makes the same images; checked."""
    same = {f.name: getattr(args, f.name) for f in fields(Sampling)}
    command = argparse.Namespace(**same, checkpoint=checkpoint, num_samples=args.num)
    vars(command).update(batch_size=CHUNK, out=Path("none.npz"), tf32=False, compile=False)
    sample_ddp.check(command)
    return command


def titles(checkpoint: Path, several: bool) -> tuple[str, list[str]]:
    """Title and notes of its row: the step, with the run's name if there are several."""
    name, *step = name_of(checkpoint)
    known = (read_record(checkpoint / STATE) or {}).get("step")
    step = known if known is not None else int(step[0]) if step else None
    if step is None:
        return name, []
    return (name, [f"step {step:,}"]) if several else (f"step {step:,}", [])


def draw_samples(command: argparse.Namespace) -> Tensor:
    """(N, 3, H, W) uint8."""
    device, settings = choose_device(), sample_ddp.sampling(command)
    nets = sample_ddp.load_networks(command, device)
    num = command.num_samples
    parts = [range(start, min(start + CHUNK, num)) for start in range(0, num, CHUNK)]
    return torch.cat([draw_images(settings, *nets, part, device) for part in parts])


if __name__ == "__main__":
    cli.run(main)
