"""Train a small timm network to classify a labelled data source, and save it as a local timm file.

    python scripts/train_classifier.py --network test_resnet --size 64 --out encoder.safetensors

The quickstart trains two of them on digits: one is the frozen encoder to align with, the other, of
another architecture and seed, judges what was generated.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli
from utils.data.registry import SOURCES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--network", default="test_resnet", help="any timm name")
    side = cli.number(int, at_least=8, at_most=1024)
    parser.add_argument("--size", type=side, default=64, help="input side in pixels")
    parser.add_argument("--data", choices=SOURCES, default="digits", help="as data.source")
    parser.add_argument("--path", type=cli.path, help="folder of the source, as data.path")
    parser.add_argument("--resolution", type=side, default=16, help="pixels the images come at")
    parser.add_argument("--train-split", default="train", help="digits only")
    parser.add_argument("--test-split", default="test", help="digits only")
    parser.add_argument("--steps", type=cli.positive, default=300, help="optimizer steps")
    size = cli.number(int, at_least=1, at_most=10_000)
    parser.add_argument("--batch-size", type=size, default=64, help="images of one step")
    rate = cli.number(float, above=0, at_most=1)
    parser.add_argument("--lr", type=rate, default=2e-3, help="largest learning rate of AdamW")
    seed = cli.not_negative
    parser.add_argument("--seed", type=seed, default=0, help="weights, batches and augmentation")
    out_help = "file to write, .safetensors"
    parser.add_argument("--out", type=cli.file_path, required=True, help=out_help)
    args = parser.parse_args(argv)
    cli.check_output("--out", args.out, ".safetensors", [args.path])
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from utils.paper import classifier


def main() -> None:
    args = parse_args()
    train_x, train_y = classifier.read_all(args.data, args.path, args.resolution, args.train_split)
    test_set = classifier.read_all(args.data, args.path, args.resolution, args.test_split)
    net = classifier.new_classifier(args.network, args.size, int(train_y.max()) + 1, args.seed)
    net.check_input(args.resolution)
    start = time.perf_counter()
    recipe = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed")}
    classifier.fit(net, train_x, train_y, **recipe)
    seconds, accuracy = time.perf_counter() - start, net.accuracy(*test_set)
    facts = {"network": args.network, "size": args.size, "seed": args.seed, "accuracy": accuracy}
    classifier.save(net, facts, args.out)
    print(f"{args.out}: {args.network}, held-out accuracy {accuracy:.1%}, {seconds:.0f} s")


if __name__ == "__main__":
    cli.run(main)
