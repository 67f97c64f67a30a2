"""Metrics of samples against a reference, or of a VAE's reconstructions; prints a table.

    python evaluate_fid.py --samples samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate_fid.py --samples s.npz --reference digits:test@32 --features timm:NAME@FILE
    python evaluate_fid.py --vae sdvae --data packed:DIR --metrics rfid,psnr,ssim,latents

Runs in one process, or on several GPUs under `accelerate launch`. Weight files are checked by their
sha256, and downloaded only with --download. What each metric is: utils/evaluation/metrics.py; how
the numbers are named, and which are comparable to papers: utils/evaluation/report.py.
"""

import argparse
import os
from dataclasses import fields
from pathlib import Path

from models.errors import UserError
from utils import cli
from utils.evaluation import options as asked
from utils.evaluation.images.naming import IMAGES, is_source
from utils.evaluation.metrics import METRICS, VAE_METRICS, select_metrics
from utils.evaluation.options import PR_MODES, Options
from utils.files import write_json

DEFAULTS = Options()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--out", type=cli.file_path, help="write the record here as JSON")
    add("--batch-size", type=cli.positive, default=DEFAULTS.batch_size, help="images per rank")
    add("--dry-run", action="store_true", help="say what would be done; reads headers alone")
    names = f"some of {','.join(METRICS)}; with --vae of {','.join(VAE_METRICS)}"
    add("--metrics", help=f"{names}; default: those that the files allow")

    add = parser.add_argument_group("samples against a reference").add_argument
    add("--samples", type=cli.path, help=IMAGES)
    add("--reference", type=cli.path, help="the same, or an .npz with mu, sigma, mu_s, sigma_s")
    add("--pr-mode", choices=PR_MODES, default=DEFAULTS.pr_mode, help="precision/recall distances")
    cache_help = "folder of reference statistics, or none"
    add("--cache", type=cli.path, default=DEFAULTS.cache, help=cache_help)

    add = parser.add_argument_group("a VAE's reconstructions").add_argument
    vae_help = "short name (models/vae_families.py), hub id, checkpoint, run, folder or .pt"
    add("--vae", type=cli.path, help=vae_help)
    weights_help = "weights for a short name: hub, or a file or folder"
    add("--vae-weights", type=cli.path, default="hub", help=weights_help)
    data_help = "images to reconstruct, named as for --samples, e.g. packed:DIR"
    add("--data", type=cli.path, help=data_help)
    side = "pixels, for a --data that crops; default: that of packed data, else 256"
    add("--resolution", type=cli.positive, help=side)
    add("--split", default="all", help="all, train or test; digits only")
    num_help = "reconstruct that many images, evenly spaced, and not all"
    add("--num", type=cli.positive, help=num_help)
    add("--posterior", choices=("mode", "sample"), default="mode", help="the latents to decode")
    add("--seed", type=cli.not_negative, default=0, help="seed of --posterior sample")
    add("--lpips-weights", type=cli.path, help="vgg16 file, for lpips; default: torchvision's")

    add = parser.add_argument_group("features").add_argument
    add("--features", default=DEFAULTS.features, help=asked.FEATURES)
    add("--weights", type=cli.path, help="of inception or dinov2; default: the published file")
    sha_help = "its sha256, if it is not the published file"
    add("--weights-sha256", type=sha256, help=sha_help)
    add("--download", action="store_true", help="fetch published weights that are missing")
    args = parser.parse_args(argv)
    args.given = [name for name, v in vars(args).items() if v != parser.get_default(name)]
    return args


def sha256(text: str) -> str:
    """Type of an argument: a sha256, or its first 8 digits or more."""
    if not 8 <= len(text) <= 64 or set(text.lower()) - set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 8 to 64 hexadecimal digits")
    return text.lower()


def read_options(args: argparse.Namespace) -> Options:
    """The library's options. The syntax of the features is checked, nothing is loaded."""
    asked.parse_features(args.features)
    chosen = {field.name: getattr(args, field.name) for field in fields(Options)}
    chosen["metrics"] = (
        tuple(name.strip() for name in args.metrics.split(",")) if args.metrics else None
    )
    chosen["cache"] = None if args.cache == "none" else args.cache
    return Options(**chosen)


def check_args(args: argparse.Namespace) -> None:
    """`UserError` for combinations that mean nothing."""
    if args.metrics is not None and not args.metrics.strip():
        raise UserError("--metrics '': expected names, or leave it out for the default ones")
    if bool(args.vae) == bool(args.samples):
        raise UserError("give either --samples FILE --reference FILE, or --vae SPEC --data SPEC")
    if args.vae and not args.data:
        raise UserError(f"--vae {args.vae} needs --data, the images to reconstruct: {IMAGES}")
    of_vae = ("vae", "data", "num", "lpips_weights", "vae_weights", "resolution", "split")
    other = ("samples", "reference", "pr_mode") if args.vae else (*of_vae, "posterior", "seed")
    if mixed := [name for name in other if name in args.given]:
        flag, mode = mixed[0].replace("_", "-"), "--vae" if args.vae else "--samples"
        raise UserError(f"--{flag} does not go with {mode}: leave one of them out")
    select_metrics(VAE_METRICS if args.vae else METRICS, read_options(args).metrics)
    from_file = args.samples and Path(args.samples).name  # "." and "/" have no record beside them
    record = Path(args.samples).with_suffix(".json") if from_file else None
    if args.out and record and cli.same_place(args.out, record):
        raise UserError(f"--out {args.out} is the samples' own record; give another name")
    inputs = (args.samples, args.reference, args.weights, args.vae, args.data, args.lpips_weights)
    if args.out:
        cli.check_output("--out", args.out, inputs=inputs)
    if args.cache not in (DEFAULTS.cache, "none"):
        cli.check_output_folder("--cache", Path(args.cache))


def plan(args: argparse.Namespace) -> str:
    """What a run would do."""
    lines = [f"features   {args.features}"]
    lines.append(f"metrics    {args.metrics or 'all default ones that are defined'}")
    if args.vae:
        lines.append(f"vae        {args.vae}, posterior {args.posterior}")
    family, _, checkpoint = asked.parse_features(args.features)
    weights = checkpoint or args.weights
    if weights is None and family in asked.PUBLISHED:
        lines.append(f"weights    {asked.PUBLISHED[family]['name']} in torch's hub cache")
    files = {"samples": args.samples, "reference": args.reference, "data": args.data,
             "weights": weights, "out": args.out}  # fmt: skip
    for what, path in files.items():
        if path is not None:
            missing = not (Path(path).exists() or what == "out" or is_source(str(path)))
            lines.append(f"{what:<10} {path}{'  (no such file yet)' * missing}")
    return "\n".join([*lines, f"batch size {args.batch_size} per rank; dry run: nothing done"])


def check_there(args: argparse.Namespace, options: Options) -> None:
    """`UserError` for images and statistics that are there and that the run would refuse; in a dry
    run, those that are absent are still to come."""
    given = (args.vae and args.data) or args.samples
    there, known = (bool(spec and os.path.lexists(spec)) for spec in (given, args.reference))
    if not there and not known:
        return
    from utils.evaluation.evaluate import check_sets, refuse_swapped
    from utils.evaluation.images.image_sets import record_beside
    from utils.evaluation.reference import Reference

    if there and known and not args.vae:
        refuse_swapped(args.samples, args.reference)
    images = open_given(given, args) if there else None
    target = Reference(args.reference, images.size[0] if images else 256) if known else None
    if images and not args.vae:
        record_beside(args.samples)
        if known or args.reference is None:
            family = asked.parse_features(args.features)[0]
            check_sets(images, target, options.metrics, family)


def open_given(spec: str, args: argparse.Namespace):
    """The images that the user has given, or as many of them as --num says."""
    from utils.evaluation.images.image_sets import open_images, subset

    images = open_images(spec, args.resolution, args.split)
    if args.resolution not in (None, images.size[0]):
        text = f"--resolution {args.resolution}: {spec} holds images of {images.size[0]} px"
        raise UserError(f"{text}; leave it out")
    return subset(images, args.num)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    options = read_options(args)
    check_args(args)
    if args.dry_run:
        check_there(args, options)
        print(plan(args))
        return
    # torch and diffusers take seconds, which --help and --dry-run need not wait for
    from utils.distributed import Ranks
    from utils.evaluation.evaluate import evaluate
    from utils.evaluation.report import format_table

    ranks = Ranks()
    if args.vae:
        record = run_vae(args, options, ranks)
    else:
        progress = progress_bars(ranks)
        record = evaluate(args.samples, args.reference, options, ranks=ranks, progress=progress)
    record["ranks"] = ranks.world
    ranks.print(format_table(record))
    if args.out:
        ranks.on_main(lambda: write_record(args.out, record))


def run_vae(args: argparse.Namespace, options: Options, ranks) -> dict:
    from models.lpips import load_lpips
    from models.vae import load_vae
    from utils.evaluation.reconstruction import evaluate_vae
    from utils.sampling.locate import locate_vae_spec

    metrics = select_metrics(VAE_METRICS, options.metrics)
    images = open_given(args.data, args)
    spec = ranks.on_main(lambda: locate_vae_spec(args.vae))
    vae = ranks.main_first(lambda: load_vae(spec, args.vae_weights))
    lpips = None
    if any(metric.needs_lpips for metric in metrics):
        lpips = ranks.main_first(lambda: load_lpips(args.lpips_weights, args.download))
    record = evaluate_vae(
        vae, images, options, posterior=args.posterior, seed=args.seed, lpips_net=lpips,
        ranks=ranks, progress=progress_bars(ranks),
    )  # fmt: skip
    record["vae"] = {"spec": spec, "weights": args.vae_weights}
    return record


def progress_bars(ranks):
    """A progress bar for each pass, on the main process."""
    from tqdm import tqdm

    def start(what: str):
        bar = tqdm(desc=what, unit=" images", disable=not ranks.is_main, leave=False)

        def show(done: int) -> None:
            bar.update(done - bar.n)

        return show

    return start


def write_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
