"""Sample images from a checkpoint, on all ranks, into the .npz that FID suites read.

    accelerate launch sample_ddp.py --checkpoint exps/NAME/checkpoints/0400000 --out NAME.npz

Image i depends on (seed, i) alone: the same pixels for any number of ranks and any batch size, up
to the rounding of floating-point sums. Finished blocks of images are kept: run the same command
again to continue a killed one, on more or fewer GPUs and with another --batch-size if need be.
Beside NAME.npz (`arr_0`, uint8 NHWC) lie NAME.json with every setting, NAME.labels.npy with the
classes, and NAME.png with the first 64 images.
"""

import argparse

from utils import cli
from utils.sampling.settings import SamplingSettings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=cli.file_path, required=True, help="folder with sit_ema/ and vae/")
    add("--out", type=cli.file_path, required=True, help=".npz to write")
    add("--num-samples", type=cli.positive, default=50_000, help="images 0, 1, ... of the seed")
    SamplingSettings.add_arguments(parser)
    add("--dry-run", action="store_true", help="check, print the settings, and exit")
    args = parser.parse_args(argv)
    cli.check_output("--out", args.out, ".npz")
    SamplingSettings.from_args(args)
    return args


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
from utils.sampling.background import BackgroundWriter
from utils.sampling.images import begin_images
from utils.sampling.load import check_balance, load_networks, open_checkpoint, settings_for
from utils.sampling.output import SampleFiles


def main() -> None:
    args = parse_args()
    ranks = Ranks()
    files, todo = ranks.on_main(lambda: prepare(args, ranks.device))
    if files is None:
        return
    load = partial(load_networks, args.checkpoint, files.checkpoint.settings, ranks.device)
    nets = ranks.main_first(load) if todo else None
    ranks.on_main(files.begin)  # nothing is written before it is clear that the weights fit
    started = time.perf_counter()
    make_blocks(files, nets, todo, ranks)
    ranks.wait()
    if ranks.is_main:
        files.finish(session_facts(files, todo, time.perf_counter() - started, ranks))
        print(f"{args.out}: {args.num_samples} images")


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[SampleFiles | None, list[int]]:
    """The files to write and the blocks of them still to be made; no files if nothing is to do."""
    settings = settings_for(device, SamplingSettings.from_args(args))
    checkpoint = open_checkpoint(args.checkpoint, settings)
    check_balance(checkpoint.settings, args.num_samples, checkpoint.num_classes)
    files = SampleFiles(args.out, checkpoint, args.num_samples)
    done = files.is_done()
    todo = [] if done else files.check()
    if args.dry_run:
        if todo:  # the weights fit
            load_networks(args.checkpoint, checkpoint.settings, torch.device("cpu"))
        print(json.dumps(files.settings, indent=1))
        return None, []
    if done:
        print(f"{args.out}: has these {args.num_samples} images already; nothing to do")
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
