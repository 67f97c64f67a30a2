"""Sample images from a checkpoint, on all ranks, into the .npz that FID suites read.

    accelerate launch sample_ddp.py --checkpoint exps/NAME --out NAME.npz
    python sample_ddp.py --checkpoint exps/NAME --classes "golden retriever,otter" --png DIR
    python sample_ddp.py --checkpoint exps/NAME --list

Image i depends on (seed, i) alone: the same pixels for any number of ranks and any batch size, up
to the rounding of floating-point sums. Finished blocks of images are kept: run the same command
again to continue a killed one, on more or fewer GPUs and with another --batch-size if need be.
Beside NAME.npz (`arr_0`, uint8 NHWC) lie NAME.json with every setting, NAME.labels.npy with the
labels, and NAME.png with the first 64 images and the names of their classes.
"""

import argparse

from models.checks.errors import UserError
from utils import cli
from utils.process.written import SAMPLES
from utils.sampling.settings import SamplingSettings, add_classes, check_classes

NUM_SAMPLES, PER_CLASS = 50_000, 8


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    what = "a checkpoint, a run (its newest whole one), or OWNER/NAME[@REVISION] of the hub"
    add("--checkpoint", type=cli.file_path, required=True, help=what)
    add("--list", action="store_true", help="print the checkpoints of the run, and exit")
    add("--out", type=cli.file_path, help=".npz to write; default with --png DIR: DIR.npz")
    what = "also write each image as DIR/000000.png, ..., with the labels in DIR/labels.csv"
    add("--png", type=cli.file_path, metavar="DIR", help=what)
    what = f"images 0, 1, ... of the seed; default: {NUM_SAMPLES}, or that of --per-class"
    add("--num-samples", type=cli.positive, help=what)
    add_classes(parser)
    what = f"images of each of --classes; default: {PER_CLASS}"
    add("--per-class", type=cli.positive, metavar="N", help=what)
    SamplingSettings.add_arguments(parser)
    add("--dry-run", action="store_true", help="check, print the settings, and exit")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Fill in --out; `UserError` for flags that contradict each other."""
    if args.list:
        return
    if args.png and args.out is None:
        if not args.png.name:
            raise UserError(f"--png {args.png}: name a folder in it, for an .npz is written beside")
        args.out = args.png.with_name(f"{args.png.name}.npz")
    if args.out is None:
        raise UserError("name what to write: --out NAME.npz, or --png DIR")
    cli.check_output("--out", args.out, SAMPLES, [args.checkpoint])
    if args.png:
        cli.check_output_folder("--png", args.png, [args.checkpoint])
    if args.png and cli.same_place(args.png, args.out):
        raise UserError(f"--png {args.png} is --out: name another folder")
    if args.per_class and not args.classes:
        raise UserError(f"--per-class {args.per_class} needs --classes; for all: --class-balanced")
    check_classes(args)
    SamplingSettings.from_args(args)


def count_samples(args: argparse.Namespace, num_chosen: int) -> int:
    """The number of images; `num_chosen` is that of --classes, 0 without."""
    if not num_chosen:
        return args.num_samples or NUM_SAMPLES
    total = num_chosen * (args.per_class or PER_CLASS)
    if args.per_class and args.num_samples not in (None, total):
        text = f"--num-samples {args.num_samples} is not --per-class {args.per_class} times"
        raise UserError(f"{text} {num_chosen} of --classes, which is {total}: leave one out")
    return args.num_samples or total


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

import json
import time
from functools import partial

import torch
from tqdm import tqdm

from models.sit import SiT
from models.vae import VAE
from utils.distributed import Ranks
from utils.pictures.samples import save_samples
from utils.sampling.background import BackgroundWriter
from utils.sampling.images import begin_images
from utils.sampling.load import check_balance, load_networks, open_checkpoint, settings_for
from utils.sampling.locate import list_checkpoints, locate_checkpoint
from utils.sampling.output import SampleFiles


def main() -> None:
    args = parse_args()
    ranks = Ranks()
    if args.list:
        ranks.on_main(lambda: print(list_checkpoints(args.checkpoint)))
        return
    files, todo = ranks.on_main(lambda: prepare(args, ranks.device))
    if files is None:
        return
    folder = files.checkpoint.folder
    if not folder.is_dir():  # the main process has downloaded it into another machine's cache
        folder = locate_checkpoint(args.checkpoint)
    load = partial(load_networks, folder, files.checkpoint.settings, ranks.device)
    nets = ranks.main_first(load) if todo else None
    ranks.on_main(files.begin)  # nothing is written before it is clear that the weights fit
    started = time.perf_counter()
    make_blocks(files, nets, todo, ranks)
    ranks.wait()
    if ranks.is_main:
        facts = session_facts(files, todo, time.perf_counter() - started, ranks)
        files.finish(facts, save_samples)
        print(f"{args.out}: {files.num_samples} images")


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[SampleFiles | None, list[int]]:
    """The files to write and the blocks of them still to be made; no files if nothing is to do."""
    settings = settings_for(device, SamplingSettings.from_args(args))
    checkpoint = open_checkpoint(locate_checkpoint(args.checkpoint), settings, args.classes)
    num_samples = count_samples(args, len(checkpoint.settings.classes))
    check_balance(checkpoint.settings, num_samples, checkpoint.num_classes)
    files = SampleFiles(args.out, checkpoint, num_samples, args.png)
    done = files.is_done()
    todo = [] if done else files.check()
    if args.dry_run:
        if todo:  # the weights fit
            load_networks(checkpoint.folder, checkpoint.settings, torch.device("cpu"))
        print(json.dumps(files.settings, indent=1))
        return None, []
    if done:
        made = files.add_pngs()
        todo = f"{args.png} written from it" if made else "nothing to do"
        print(f"{args.out}: has these {num_samples} images already; {todo}")
        files.blocks.remove()
        return None, []
    return files, todo


def make_blocks(
    files: SampleFiles, nets: tuple[SiT, VAE] | None, todo: list[int], ranks: Ranks
) -> None:
    """Sample this rank's share of the blocks in `todo`; each is written while the next is made."""
    if nets is None:  # all blocks are there already
        return
    left = count_images(files, todo)
    show = ranks.is_main and left > 0
    total = files.num_samples
    bar = tqdm(total=total, initial=total - left, unit="img", disable=not show)

    def advance(num: int) -> None:
        """The other ranks are about as far as the main one, which shows the bar."""
        bar.update(min(num * ranks.world, bar.total - bar.n))

    with BackgroundWriter(files.write) as writer:
        for block in todo[ranks.rank :: ranks.world]:
            indices = files.blocks.items(block)
            settings = files.checkpoint.settings
            writer.put(block, begin_images(settings, *nets, indices, ranks.device, advance))
    bar.close()


def count_images(files: SampleFiles, blocks: list[int]) -> int:
    return sum(len(files.blocks.items(block)) for block in blocks)


def session_facts(files: SampleFiles, todo: list[int], seconds: float, ranks: Ranks) -> dict:
    """Facts of this session alone: what an earlier, killed one made is not counted."""
    made, on_gpu = count_images(files, todo), ranks.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(ranks.device) if on_gpu else "cpu",
        "ranks": ranks.world,
        "images_sampled": made,
        "seconds": seconds,
        "images_per_second": made / seconds if made else None,
    }


if __name__ == "__main__":
    cli.run(main)
