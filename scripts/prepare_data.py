"""Pack a data set once, so that training reads raw pixels: no decoding, and any image at once.

Example:

    python scripts/prepare_data.py SRC OUT --resolution 256

SRC is a folder of class folders (or of images), a zip, tars (WebDataset), parquet files of Hugging
Face's image layout, or the official HDF5 layout. --labels FILE gives the classes of images without
any. Images are cropped as ADM does; unreadable ones are skipped and listed in OUT/skipped.txt.
After an interruption the same command continues. Then train with data.source=packed data.path=OUT.
The layout of OUT is described in utils/data/sources/packed.py.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import cli
from utils.data.registry import LABELS_HELP, SOURCES, add_conversion_arguments, labels_argument

MOST_WORKERS = 1024
WORDS = cli.SourceWords("--source {}", "SRC {}", "--resolution {}", "--split {}", "--labels {}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("src", type=cli.file_path, help="folder of the source images, or archive")
    add("out", type=cli.file_path, help="folder to write; not inside SRC")
    add("--resolution", type=cli.positive, default=256, help="side of the packed images, in pixels")
    add("--source", choices=SOURCES, help="kind of SRC, as data.source; default: by what it holds")
    add("--split", default="all", help="part of the data, as data.split; tar, parquet: train, ...")
    add("--labels", default="auto", type=labels_argument, metavar="WHERE", help=LABELS_HELP)
    add("--workers", type=cli.number(int, at_least=0, at_most=MOST_WORKERS),
        default=os.cpu_count(), help="processes; 0 = pack in this one")  # fmt: skip
    add("--shard-size", type=cli.positive, default=32768, help="images in a file")
    add_conversion_arguments(parser)
    add("--dry-run", action="store_true", help="check, print the disk space needed, and stop")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from utils.data.base import cautions, content_of, describe
from utils.data.registry import conversion_of, open_source, source_of
from utils.data.sources.packed import finish_packing, pack, packed_folder
from utils.files import check_disk


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cli.check_output_folder("OUT", args.out, [args.src])
    print(f"listing {args.src} ...", flush=True)
    how = conversion_of(args)
    name = args.source or source_of(args.src)
    source = open_source(
        name, args.src, args.resolution, args.split, WORDS, conversion=how, labels=args.labels
    )
    for note in cautions(source):
        print(f"note: {note}")
    print(describe(source), flush=True)
    folder = packed_folder(args.out, source, name, args.shard_size)
    folder.check_plan([*folder.plan])
    check_disk(args.out, folder.bytes_to_write())
    if args.dry_run:
        return
    folder.plan |= content_of(source)  # reads every file that has not been read yet
    with folder.locked():
        folder.begin()
        pack(source, folder, args.workers)
        print(finish_packing(folder, source))


if __name__ == "__main__":
    cli.run(main)
