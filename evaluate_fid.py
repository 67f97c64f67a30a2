"""Metrics of samples against a reference, or of a VAE's reconstructions; prints a table.

    python evaluate_fid.py --samples samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate_fid.py --samples s.npz --reference digits:test@32 --features timm:NAME@FILE
    python evaluate_fid.py --vae sdvae --data packed:DIR --metrics rfid,psnr,ssim,latents

Runs in one process, or on several GPUs under `accelerate launch`. Weight files are checked by their
sha256, and downloaded only with --download. What each metric is: utils/evaluation/metrics.py; how
the numbers are named, and which are comparable to papers: utils/evaluation/report.py.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from models.errors import UserError
from utils import cli
from utils.evaluation import options as asked
from utils.evaluation.metrics import METRICS, VAE_METRICS, select_metrics
from utils.evaluation.options import IMAGES, PR_MODES, Options
from utils.files import write_json

DEFAULTS = Options()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--out", help="write the record here as JSON")
    add("--batch-size", type=int, default=DEFAULTS.batch_size, help="images per rank")
    add("--dry-run", action="store_true", help="say what would be done; read nothing")
    add("--metrics", help=f"some of {','.join(METRICS)}; with --vae of {','.join(VAE_METRICS)}")

    add = parser.add_argument_group("samples against a reference").add_argument
    add("--samples", help=IMAGES)
    add("--reference", help="the same, or an .npz with mu, sigma, mu_s, sigma_s")
    add("--pr-mode", choices=PR_MODES, default=DEFAULTS.pr_mode, help="precision/recall distances")
    add("--cache", default=DEFAULTS.cache, help="folder of reference statistics, or none")

    add = parser.add_argument_group("a VAE's reconstructions").add_argument
    add("--vae", help="short name, hub id, diffusers folder or .pt (models/vae_families.py)")
    add("--vae-weights", default="hub", help="weights for a short name: hub, or a file or folder")
    add("--data", help="images to reconstruct, named as for --samples, e.g. packed:DIR")
    add("--resolution", type=int, default=256, help="pixels, for a --data that crops")
    add("--split", default="all", help="all, train or test; digits only")
    add("--num", type=int, help="reconstruct that many images, evenly spaced, and not all")
    add("--posterior", choices=("mode", "sample"), default="mode", help="the latents to decode")
    add("--seed", type=int, default=0, help="seed of --posterior sample")
    add("--lpips-weights", help="torchvision's vgg16 file, for lpips")

    add = parser.add_argument_group("features").add_argument
    add("--features", default=DEFAULTS.features, help=asked.FEATURES)
    add("--weights", help="weight file of inception or dinov2")
    add("--weights-sha256", help="its sha256, if it is not the published file")
    add("--download", action="store_true", help="fetch published weights that are missing")
    return parser.parse_args(argv)


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
    if bool(args.vae) == bool(args.samples):
        raise UserError("give either --samples FILE --reference FILE, or --vae SPEC --data SPEC")
    if args.vae and not args.data:
        raise UserError(f"--vae {args.vae} needs --data, the images to reconstruct: {IMAGES}")
    select_metrics(VAE_METRICS if args.vae else METRICS, read_options(args).metrics)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected 1 or more")
    record = args.samples and Path(args.samples).with_suffix(".json").resolve()
    if args.out and Path(args.out).resolve() == record:
        raise UserError(f"--out {args.out} is the samples' own record; give another name")


def plan(args: argparse.Namespace) -> str:
    """What a run would do. It is looked whether files exist, but none is opened."""
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
            missing = not (Path(path).exists() or what == "out" or asked.is_source(str(path)))
            lines.append(f"{what:<10} {path}{'  (no such file yet)' * missing}")
    return "\n".join([*lines, f"batch size {args.batch_size} per rank; dry run: nothing done"])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    options = read_options(args)
    check_args(args)
    if args.dry_run:
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
        ranks.on_main(lambda: write_record(Path(args.out), record))


def run_vae(args: argparse.Namespace, options: Options, ranks) -> dict:
    from models.lpips import load_lpips
    from models.vae import load_vae
    from utils.evaluation.image_sets import open_images, subset
    from utils.evaluation.reconstruction import evaluate_vae

    metrics = select_metrics(VAE_METRICS, options.metrics)
    for metric in VAE_METRICS.values():
        if not (options.metrics or metric.by_default):
            ranks.print(f"{metric.name} skipped: it is measured only if --metrics names it")
    images = subset(open_images(args.data, args.resolution, args.split), args.num)
    vae = ranks.main_first(lambda: load_vae(args.vae, args.vae_weights))
    lpips = None
    if any(metric.needs_lpips for metric in metrics):
        lpips = ranks.main_first(lambda: load_lpips(args.lpips_weights, args.download))
    record = evaluate_vae(
        vae, images, options, posterior=args.posterior, seed=args.seed, lpips_net=lpips,
        ranks=ranks, progress=progress_bars(ranks),
    )  # fmt: skip
    record["vae"] = {"spec": args.vae, "weights": args.vae_weights}
    return record


def progress_bars(ranks):
    """A progress bar for each pass, on the main process."""
    from tqdm import tqdm

    def start(what: str):
        bar = tqdm(desc=what, unit=" images", disable=not ranks.is_main, leave=False)
        return lambda done: bar.update(done - bar.n)

    return start


def write_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
