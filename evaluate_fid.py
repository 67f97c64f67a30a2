"""Metrics of samples against a reference, or of a VAE's reconstructions; prints a table.

    python evaluate_fid.py --samples samples/NAME.npz --reference VIRTUAL_imagenet256_labeled.npz
    python evaluate_fid.py --samples s.npz --reference digits:test@32 --features timm:NAME@FILE
    python evaluate_fid.py A.npz B.npz --reference VIRTUAL_imagenet256_labeled.npz --table OUT
    python evaluate_fid.py --vae sdvae --data packed:DIR --metrics rfid,psnr,ssim,latents

Runs in one process, or on several GPUs under `accelerate launch`. Weight files are checked by their
sha256, and downloaded only with --download. What each metric is: utils/evaluation/metrics.py; how
the numbers are named, which references are taken, what is comparable to papers: docs/evaluation.md.
"""

import argparse
import os
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path

from models.checks.errors import UserError
from utils import cli
from utils.evaluation import options as asked
from utils.evaluation.images.naming import IMAGES, is_source, path_of
from utils.evaluation.metrics import METRICS, VAE_METRICS, select_metrics
from utils.evaluation.options import PR_MODES, Options
from utils.files import write_atomically, write_json
from utils.process import written

DEFAULTS = Options()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("sets", type=cli.path, nargs="*", metavar="SAMPLES", help="as --samples; several: --table")
    add("--out", type=cli.file_path, help="write the record here as JSON")
    table_help = "sets of samples beside each other: OUT.md, .png and .json; default: table"
    add("--table", type=cli.file_path, nargs="?", const="table", metavar="OUT", help=table_help)
    add("--batch-size", type=cli.positive, default=DEFAULTS.batch_size, help="images per rank")
    workers_help = "threads of each rank that read images"
    add("--workers", type=cli.positive, default=DEFAULTS.workers, help=workers_help)
    add("--dry-run", action="store_true", help="say what would be done; reads headers alone")
    names = f"some of {','.join(METRICS)}; with --vae of {','.join(VAE_METRICS)}"
    add("--metrics", help=f"{names}; default: those that the files allow")

    add = parser.add_argument_group("samples against a reference").add_argument
    add("--samples", type=cli.path, help=IMAGES)
    add("--reference", type=cli.path, help="the same, or statistics: docs/evaluation.md")
    add("--uncertainty", action="store_true", help="give each number a standard error")
    add("--pr-mode", choices=PR_MODES, default=DEFAULTS.pr_mode, help="precision/recall distances")
    cache_help = "folder of reference statistics, or none"
    add("--cache", type=cli.path, default=DEFAULTS.cache, help=cache_help)

    add = parser.add_argument_group("a VAE's reconstructions").add_argument
    vae_help = "as vae.name: short name, hub id, checkpoint, run, folder or weight file"
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
    args.sets += [args.samples] if args.samples else []
    args.samples = args.sets[0] if args.sets else None
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
    if len(args.sets) > 1 and not args.table:
        raise UserError(f"{len(args.sets)} sets of samples: add --table OUT, or give one of them")
    places = [spec if is_source(spec) else os.path.realpath(spec) for spec in args.sets]
    if twice := [spec for i, spec in enumerate(args.sets) if places[i] in places[:i]]:
        raise UserError(f"{twice[0]} is given twice: leave one of them out")
    if bool(args.vae) == bool(args.samples):
        raise UserError("give either --samples FILE --reference FILE, or --vae SPEC --data SPEC")
    if args.vae and not args.data:
        raise UserError(f"--vae {args.vae} needs --data, the images to reconstruct: {IMAGES}")
    of_vae = ("vae", "data", "num", "lpips_weights", "vae_weights", "resolution", "split")
    of_samples = ("samples", "reference", "pr_mode", "uncertainty", "table")
    other = of_samples if args.vae else (*of_vae, "posterior", "seed")
    if mixed := [name for name in other if name in args.given]:
        flag, mode = mixed[0].replace("_", "-"), "--vae" if args.vae else "--samples"
        raise UserError(f"--{flag} does not go with {mode}: leave one of them out")
    select_metrics(VAE_METRICS if args.vae else METRICS, read_options(args).metrics)
    check_outputs(args)


def check_outputs(args: argparse.Namespace) -> None:
    """`UserError` for an output that cannot be written, or would replace what is not ours. Nothing
    depends on the default cache: where it cannot be written, a warning says so later."""
    outputs = [("--out", args.out, written.EVALUATION)] if args.out else []
    outputs += [("--table", *each) for each in table_files(args.table)] if args.table else []
    if args.out and args.table:
        raise UserError("--out does not go with --table, whose JSON holds the record of each set")
    for flag, out, _ in outputs:
        from_file = (Path(each) for each in args.sets if Path(each).name)  # "." has no record
        if any(cli.same_place(out, each.with_suffix(".json")) for each in from_file):
            raise UserError(f"{flag} {out} is the samples' own record; give another name")
    given = (*args.sets, args.reference, args.data)
    networks = (args.vae, args.vae_weights, args.weights, args.lpips_weights)
    inputs = [*map(path_of, given), *networks, asked.parse_features(args.features)[2]]
    for flag, out, kind in outputs:
        cli.check_output(flag, out, kind, inputs)
    family, weights = asked.parse_features(args.features)[0], asked.PUBLISHED
    known = args.weights or family not in weights or not args.download
    if not known and not (weights_cache() / weights[family]["name"]).exists():
        cli.check_output_folder("--download: torch's cache", weights_cache())
    if args.cache not in (DEFAULTS.cache, "none"):
        cli.check_output_folder("--cache", Path(args.cache), inputs)


def table_files(out: Path) -> list[tuple[Path, written.Kind]]:
    """The Markdown, the picture and the JSON of a table, and the kinds of these files."""
    kinds = {".md": written.MARKDOWN, ".png": written.PICTURE, ".json": written.TABLE}
    if out.suffix in (".npz", ".npy") or out.is_dir():
        raise UserError(f"--table {out}: expected a name for the table; give samples before it")
    name = out.stem if out.suffix in kinds else out.name
    return [(out.with_name(name + ending), kind) for ending, kind in kinds.items()]


def weights_cache() -> Path:
    """The folder in which torch.hub keeps files of weights; torch need not be imported for it."""
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or f"{above}/torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


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
    files = [*(("samples", each) for each in args.sets), ("reference", args.reference),
             ("data", args.data), ("weights", weights), ("out", args.out),
             ("table", args.table)]  # fmt: skip
    for what, path in files:
        if path is not None:
            written_here = what in ("out", "table")
            missing = not (Path(path).exists() or written_here or is_source(str(path)))
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
    from utils.evaluation.reference import Reference

    if there and known and not args.vae:
        refuse_swapped(args.samples, args.reference)
    images = open_given(given, args) if there else None
    target = Reference(args.reference, images.size[0] if images else 256) if known else None
    if images and not args.vae and (known or args.reference is None):
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
        for each in args.sets or [None]:
            check_there(argparse.Namespace(**vars(args) | {"samples": each}), options)
        print(plan(args))
        return
    # torch and diffusers take seconds, which --help and --dry-run need not wait for
    from utils.distributed import Ranks
    from utils.evaluation.evaluate import evaluate
    from utils.evaluation.report import format_table

    ranks = Ranks()
    if args.table:
        return run_table(args, options, ranks)
    with progress_bars(ranks) as progress:
        if args.vae:
            record = run_vae(args, options, ranks, progress)
        else:
            record = evaluate(args.samples, args.reference, options, ranks=ranks, progress=progress)
    record["ranks"] = ranks.world
    ranks.print(format_table(record))
    if args.out:
        ranks.on_main(lambda: write_record(args.out, record))


def run_table(args: argparse.Namespace, options: Options, ranks) -> None:
    from utils.evaluation.table import evaluate_sets
    from utils.pictures.table import save_table

    (page, _), (picture, _), (record, _) = table_files(args.table)

    def write(table) -> None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, table.markdown())
        save_table(picture, table.head(), table.lines(), table.notes())
        write_json(record, table.as_json())

    with progress_bars(ranks) as progress:
        table = evaluate_sets(
            args.sets, args.reference, options, ranks=ranks, keep=write, progress=progress
        )
    ranks.print(table.markdown())
    ranks.print(f"written to {record}, and {page.name}, {picture.name} beside it")


def run_vae(args: argparse.Namespace, options: Options, ranks, progress) -> dict:
    from models.lpips import load_lpips, vgg_weight_file
    from models.vae import load_vae
    from utils.data.content import file_sha256
    from utils.evaluation.reconstruction import evaluate_vae
    from utils.sampling.locate import locate_vae_spec

    metrics = select_metrics(VAE_METRICS, options.metrics)
    images = open_given(args.data, args)
    spec = ranks.on_main(lambda: locate_vae_spec(args.vae))
    vae = ranks.main_first(lambda: load_vae(spec, args.vae_weights))
    lpips = sha256 = None
    if any(metric.needs_lpips for metric in metrics):
        lpips = ranks.main_first(lambda: load_lpips(args.lpips_weights, args.download))
        sha256 = file_sha256(vgg_weight_file(args.lpips_weights).fetch(False))
    record = evaluate_vae(
        vae, images, options, posterior=args.posterior, seed=args.seed, lpips_net=lpips,
        lpips_sha256=sha256, ranks=ranks, progress=progress,
    )  # fmt: skip
    record["vae"] = {"spec": spec, "weights": args.vae_weights}
    return record


@contextmanager
def progress_bars(ranks):
    """A progress bar for each pass, on the main process. It is gone before the next one begins, and
    before anything else is printed: the table, or an error."""
    from tqdm import tqdm

    with ExitStack() as shown:

        def start(what: str):
            shown.close()
            bar = tqdm(desc=what, unit=" images", disable=not ranks.is_main, leave=False)
            shown.callback(bar.close)

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return show

        yield start


def write_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    print(f"written to {path}")


if __name__ == "__main__":
    cli.run(main)
