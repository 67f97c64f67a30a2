"""Samples beside the training images that are most like them: does the model copy its training set?

    python scripts/nearest_images.py --samples samples/own.npz --training data/own32 --out near.png

The picture shows the samples that are nearest to a training image, with their three neighbours.
Distances are compared with those between training images.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli
from utils.evaluation.images.naming import IMAGES, path_of
from utils.process import written


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--samples", type=cli.path, required=True, help=IMAGES)
    add("--training", type=cli.path, required=True, help="the same, of the size of the samples")
    rows = cli.number(int, at_least=1, at_most=100)
    add("--num", type=rows, default=12, help="samples that are shown")
    add("--out", type=cli.file_path, required=True, help=".png to write")
    args = parser.parse_args(argv)
    inputs = [path_of(args.samples), path_of(args.training)]
    cli.check_output("--out", args.out, written.PICTURE, inputs)
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from utils.evaluation.images.image_sets import open_images
from utils.pictures.grid import save_grid_of_rows
from utils.pictures.nearest import NEAREST, find_nearest, nearest_row_pictures


def main() -> None:
    args = parse_args()
    samples = open_images(args.samples)
    training = open_images(args.training, samples.size[0])
    for what, images in (("samples", samples), ("training", training)):
        print("; ".join([f"{what}: {images.name}, {len(images):,} images", *images.notes]))
    found = find_nearest(samples, training)
    rows = nearest_row_pictures(found, samples, training, args.num)
    save_grid_of_rows(args.out, rows, ["sample", *(["training image"] * NEAREST)])
    print(found.summary())


if __name__ == "__main__":
    cli.run(main)
