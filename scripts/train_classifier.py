"""Train a small timm network to classify a labelled data source, and save it as a local timm file.

    python scripts/train_classifier.py --network test_resnet --size 64 --out encoder.safetensors
    python scripts/train_classifier.py --data packed --path DIR --size 128 --out encoder.safetensors

Two of them, of different architecture and seed, take the place of networks that would have to be
downloaded: one is the frozen encoder to align with, the other judges what was generated. A part of
the images is held out of training, to say how good the classifier is.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.checks.errors import UserError
from utils import cli
from utils.data.registry import (
    LABELS_HELP,
    SOURCES,
    add_conversion_arguments,
    check_path_is_read,
    labels_argument,
)
from utils.process import written

OF_DIGITS = 16  # pixels of the digits, if nothing else is said


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--network", default="test_resnet", help="any timm name")
    side = cli.number(int, at_least=8, at_most=1024)
    add("--size", type=side, default=64, help="input side in pixels")
    add("--data", choices=SOURCES, default="digits", help="kind of the images, as data.source")
    add("--path", type=cli.path, help="folder of the images, as data.path")
    add("--labels", default="auto", type=labels_argument, metavar="WHERE", help=LABELS_HELP)
    add_conversion_arguments(parser)
    pixels = f"pixels the images come at; default: that of packed data, {OF_DIGITS} of digits, "
    add("--resolution", type=side, help=f"{pixels}else --size")
    add("--train-split", help="as data.split; default: train of the digits, else all")
    add("--test-split", help="the same; default: test of the digits, else see --holdout")
    share = cli.number(float, above=0, below=1)
    add("--holdout", type=share, help="share of each class that is held out of training; default: "
        "0.2 for data without a test split")  # fmt: skip
    add("--steps", type=cli.positive, default=300, help="optimizer steps")
    size = cli.number(int, at_least=1, at_most=10_000)
    add("--batch-size", type=size, default=64, help="images of one step")
    rate = cli.number(float, above=0, at_most=1)
    add("--lr", type=rate, default=2e-3, help="largest learning rate of AdamW")
    add("--seed", type=cli.not_negative, default=0, help="weights, batches and augmentation")
    add("--out", type=cli.file_path, required=True, help="file to write, .safetensors")
    args = parser.parse_args(argv)
    if args.holdout and args.test_split:
        text = f"--holdout {args.holdout} takes the place of --test-split {args.test_split}"
        raise UserError(f"{text}: give one of them")
    cli.check_output("--out", args.out, written.CLASSIFIER, [args.path])
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from utils.data.base import Source, cautions, describe
from utils.data.registry import conversion_of, open_source, source_class
from utils.paper import classifier
from utils.paper.classifier import Split


def main() -> None:
    args = parse_args()
    train, test = open_splits(args)
    for line in (describe(train.source), *cautions(train.source)):
        print(line, flush=True)
    classifier.check_splits(train, test)
    (x_u8, y), held_out = classifier.read(train), classifier.read(test)
    net = classifier.new_classifier(args.network, args.size, train.source.num_classes, args.seed)
    net.check_input(train.source.resolution)
    start = time.perf_counter()
    recipe = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed")}
    classifier.fit(net, x_u8, y, **recipe)
    seconds, accuracy = time.perf_counter() - start, net.accuracy(*held_out)
    facts = {"network": args.network, "size": args.size, "seed": args.seed, "accuracy": accuracy}
    classifier.save(net, facts, args.out)
    text = f"{accuracy:.1%} of {len(held_out[1]):,} held-out images are classified right"
    print(f"{args.out}: {args.network}, {text}, {seconds:.0f} s")


def open_splits(args: argparse.Namespace) -> tuple[Split, Split]:
    """The images to train on, and those that are held out."""
    check_path_is_read(args)
    cls = source_class(args.data, words=cli.FLAGS)
    known = () if cls.needs_path else cls.splits  # whether files have parts, their names say
    first = args.train_split or ("train" if "train" in known else "all")
    second = args.test_split or ("test" if "test" in known and not args.holdout else None)
    source = opened(args, first, "--train-split {}")
    if second is None:
        return classifier.hold_out(source, args.holdout or classifier.HELD_OUT)
    other = source if second == first else opened(args, second, "--test-split {}")
    return Split(source, range(len(source))), Split(other, range(len(other)))


def opened(args: argparse.Namespace, split: str, flag: str) -> Source:
    """A split of the data; `flag` is how the user asks for it, with {} for its name."""
    resolution = args.resolution
    if resolution is None and args.data != "packed":
        resolution = OF_DIGITS if args.data == "digits" else args.size
    words = cli.FLAGS._replace(split=flag)
    how = conversion_of(args)
    return open_source(args.data, args.path, resolution, split, words, how, args.labels)


if __name__ == "__main__":
    cli.run(main)
