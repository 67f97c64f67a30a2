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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--network", default="test_resnet", help="any timm name")
    parser.add_argument("--size", type=int, default=64, help="input side in pixels")
    parser.add_argument("--data", default="digits", help="source, as data.source")
    parser.add_argument("--path", help="folder of the source, as data.path")
    parser.add_argument("--resolution", type=int, default=16, help="pixels the images come at")
    parser.add_argument("--train-split", default="train", help="digits only")
    parser.add_argument("--test-split", default="test", help="digits only")
    parser.add_argument("--steps", type=cli.positive, default=300, help="optimizer steps")
    parser.add_argument("--batch-size", type=cli.positive, default=64, help="images of one step")
    parser.add_argument("--lr", type=float, default=2e-3, help="largest learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="weights, batches and augmentation")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from utils.paper import classifier


def main() -> None:
    args = parse_args()
    train_x, train_y = classifier.read_all(args.data, args.path, args.resolution, args.train_split)
    test_set = classifier.read_all(args.data, args.path, args.resolution, args.test_split)
    net = classifier.new_classifier(args.network, args.size, int(train_y.max()) + 1, args.seed)
    start = time.perf_counter()
    recipe = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed")}
    classifier.fit(net, train_x, train_y, **recipe)
    seconds, accuracy = time.perf_counter() - start, net.accuracy(*test_set)
    facts = {"network": args.network, "size": args.size, "seed": args.seed, "accuracy": accuracy}
    classifier.save(net, facts, args.out)
    print(f"{args.out}: {args.network}, held-out accuracy {accuracy:.1%}, {seconds:.0f} s")


if __name__ == "__main__":
    cli.run(main)
