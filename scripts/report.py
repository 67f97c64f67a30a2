"""One page about one or several runs: pictures, curves, evaluations, settings, versions.

    python scripts/report.py exps/NAME                     # writes exps/NAME/report.html
    python scripts/report.py exps/A exps/B --out ab.html   # laid over each other

The page is one file that fetches nothing. It can be made while a run is still going on. What its
parts say: docs/report.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli
from utils.process import written

SEVERAL = Path("report.html")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    runs_help = "folders of runs, e.g. exps/NAME"
    parser.add_argument("runs", nargs="+", type=cli.file_path, metavar="RUN", help=runs_help)
    out_help = "the page; default: RUN/report.html, and report.html here for several runs"
    parser.add_argument("--out", type=cli.file_path, metavar="FILE", help=out_help)
    args = parser.parse_args(argv)
    for run in args.runs:
        cli.check_input("RUN", run, folder=True)
    args.out = args.out or (args.runs[0] / SEVERAL if len(args.runs) == 1 else SEVERAL)
    cli.check_output("--out", args.out, written.PAGE)
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the import below, which takes seconds

from utils.files import format_bytes
from utils.report.page import write_report


def main() -> None:
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_report(args.runs, args.out)
    size = format_bytes(args.out.stat().st_size)
    print(f"written to {args.out} ({size}): open it in a browser")


if __name__ == "__main__":
    cli.run(main)
