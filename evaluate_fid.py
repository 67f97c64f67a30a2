"""Metrics of samples against a reference, or of a VAE's reconstructions; table and JSON.

    python evaluate_fid.py --samples samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate_fid.py --samples s.npz --reference digits:test@32 --features timm:NAME@FILE
    python evaluate_fid.py --vae sdvae --data packed:DIR --metrics rfid,psnr,ssim,latents

Runs in one process or under `accelerate launch`. What each number is: utils/metrics.py; how it is
named: utils/report.py. Weight files are checked by sha256, and downloaded only with --download.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from loss.reconstruction import load_lpips
from models.errors import UserError
from models.vae import load_vae
from utils import cli
from utils.evaluation import DEFAULT_CACHE, METRICS, PR_MODES, Options, evaluate
from utils.feature_stats import Ranks
from utils.features import SYNTAX as FEATURES
from utils.features import parse_features
from utils.image_sets import SYNTAX as IMAGES
from utils.image_sets import is_source, open_images, subset
from utils.report import format_table
from utils.vae_evaluation import VAE_METRICS, choose_vae_metrics, evaluate_vae
from utils.weight_files import PUBLISHED, default_weights


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the record here as JSON")
    parser.add_argument("--batch-size", type=int, default=64, help="images per rank")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done; read nothing"
    )
    group = parser.add_argument_group("samples against a reference")
    group.add_argument("--samples", help=IMAGES)
    group.add_argument("--reference", help="the same, or an .npz with mu, sigma, mu_s, sigma_s")
    group.add_argument("--pr-mode", choices=PR_MODES, default=PR_MODES[0], help="precision/recall")
    group.add_argument("--cache", default=DEFAULT_CACHE, help="reference statistics; none = off")
    group = parser.add_argument_group("a VAE's reconstructions")
    group.add_argument("--vae", help="short name, hub id, diffusers folder or .pt (models/vae.py)")
    group.add_argument("--vae-weights", default="hub", help="weights of a short name, if not hub")
    group.add_argument("--data", help="what to reconstruct: as --samples, e.g. packed:DIR, digits")
    group.add_argument("--resolution", type=int, default=256, help="pixels, for --data that crops")
    group.add_argument("--split", default="all", help="all, train or test; digits only")
    group.add_argument("--num", type=int, help="that many images, evenly spaced; default all")
    group.add_argument("--posterior", choices=("mode", "sample"), default="mode", help="latents")
    group.add_argument("--seed", type=int, default=0, help="of --posterior sample")
    group.add_argument("--lpips-weights", help="torchvision vgg16 file, for lpips")
    group = parser.add_argument_group("features")
    group.add_argument("--features", default="inception", help=FEATURES)
    group.add_argument("--metrics", help=f"{','.join(METRICS)}; with --vae {','.join(VAE_METRICS)}")
    group.add_argument("--weights", help="weight file of inception or dinov2")
    group.add_argument("--weights-sha256", help="expected hash, if other weights are meant")
    group.add_argument("--download", action="store_true", help="fetch missing published weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    options = read_options(args)
    check_args(args)
    if args.dry_run:
        print(plan(args, options))
        return
    ranks = Ranks()
    record = run_vae(args, options, ranks) if args.vae else run_samples(args, options, ranks)
    if ranks.is_main:
        record["ranks"] = ranks.world
        print(format_table(record))
        if args.out:
            write_record(Path(args.out), record)


def read_options(args: argparse.Namespace) -> Options:
    """The library's options; the features' syntax is checked, nothing is loaded."""
    parse_features(args.features)
    return Options(
        features=args.features,
        metrics=tuple(args.metrics.split(",")) if args.metrics else None,
        weights=args.weights,
        weights_sha256=args.weights_sha256,
        download=args.download,
        batch_size=args.batch_size,
        pr_mode=args.pr_mode,
        cache=None if args.cache == "none" else args.cache,
    )


def check_args(args: argparse.Namespace) -> None:
    """Combinations that mean nothing."""
    if bool(args.vae) == bool(args.samples):
        raise UserError(
            "expected either --samples FILE --reference FILE, or --vae SPEC --data SPEC"
        )
    if args.vae and not args.data:
        raise UserError(f"--vae {args.vae} needs --data, the images to reconstruct: {IMAGES}")
    known = VAE_METRICS if args.vae else METRICS
    unknown = [name for name in (args.metrics or known[0]).split(",") if name not in known]
    if unknown:
        raise UserError(f"--metrics {unknown[0]!r}: expected some of {','.join(known)}")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected 1 or more")
    record = Path(args.samples).with_suffix(".json") if args.samples else None
    if args.out and record is not None and Path(args.out).resolve() == record.resolve():
        raise UserError(f"--out {args.out} is the samples' own record; give another name")


def plan(args: argparse.Namespace, options: Options) -> str:
    """What a run would do: paths are looked for, nothing is opened."""
    family, _, checkpoint = parse_features(args.features)
    weights = checkpoint or args.weights
    if weights is None and family in PUBLISHED:
        weights = default_weights(family)
    files = {"samples": args.samples, "reference": args.reference, "data": args.data,
             "weights": weights, "out": args.out}  # fmt: skip
    lines = [f"features   {args.features}", f"metrics    {args.metrics or 'all that are defined'}"]
    lines += [f"vae        {args.vae}, posterior {args.posterior}"] if args.vae else []
    for what, path in files.items():
        if path is not None:
            missing = not (Path(path).exists() or what == "out" or is_source(str(path)))
            lines.append(f"{what:<10} {path}{'  (no such file yet)' * missing}")
    return "\n".join([*lines, f"batch size {options.batch_size} per rank; dry run: nothing done"])


def run_samples(args: argparse.Namespace, options: Options, ranks: Ranks) -> dict:
    return evaluate(args.samples, args.reference, options, ranks=ranks, progress=bars(ranks))


def run_vae(args: argparse.Namespace, options: Options, ranks: Ranks) -> dict:
    names = choose_vae_metrics(options.metrics)
    if "lpips" not in names and ranks.is_main:
        print("lpips skipped: not asked for (--metrics ...,lpips; it needs VGG-16 weights)")
    images = subset(open_images(args.data, args.resolution, args.split), args.num)
    vae = load_vae(args.vae, args.vae_weights)
    lpips_net = load_perceptual(args, ranks) if "lpips" in names else None
    record = evaluate_vae(
        vae, images, options, posterior=args.posterior, seed=args.seed, lpips_net=lpips_net,
        ranks=ranks, progress=bars(ranks),
    )  # fmt: skip
    record["vae"] = {"spec": args.vae, "weights": args.vae_weights}
    return record


def load_perceptual(args: argparse.Namespace, ranks: Ranks):
    """LPIPS; rank 0 alone downloads."""
    if args.download:
        ranks.on_main(lambda: str(load_lpips(args.lpips_weights, True)))
    return load_lpips(args.lpips_weights, download=False)


def bars(ranks: Ranks):
    """A progress bar for each pass, on rank 0."""

    def start(what: str):
        bar = tqdm(desc=what, unit=" images", disable=not ranks.is_main, leave=False)
        return lambda done: bar.update(done - bar.n)

    return start


def write_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
