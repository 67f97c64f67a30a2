"""The end of the quickstart: score the generated digits, draw grids and curves, write the summary
and report.html.

python scripts/quickstart_report.py --run exps/quickstart
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--run", type=cli.file_path, required=True, help="folder of the run")
    args = parser.parse_args(argv)
    cli.check_input("--run", args.run, folder=True)
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from utils.paper.quickstart_report import report, summary_text
from utils.report.page import write_report


def main() -> None:
    run = parse_args().run
    summary = report(run)
    write_report([run], run / "report.html")
    print(summary_text(run, summary))


if __name__ == "__main__":
    cli.run(main)
