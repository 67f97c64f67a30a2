"""The tables of the paper: what a row takes, what has been measured, and both side by side.

    python scripts/reproduce_tables.py list                      # rows, and what was measured
    python scripts/reproduce_tables.py command 7/init-400k       # train, sample, evaluate
    python scripts/reproduce_tables.py show --table 7            # Markdown
    python scripts/reproduce_tables.py digits                    # the phenomenon on a CPU

Published numbers: utils/paper/published.yaml. Measured ones: records of `evaluate_fid.py --out`
below --results; a record belongs to the row whose run and step its samples came from. A record of
fewer images, of another feature network or reference never stands in a table: it is listed below.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import cli
from utils.process import written

DEFAULT_RESULTS = ROOT / "exps"
TABLES = "tables.md"  # in the folder of --out


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    names = "list | command | show | digits"
    actions = parser.add_subparsers(required=True, dest="action", metavar=names)
    rows = actions.add_parser("list", help="rows, with what has been measured")
    command = actions.add_parser("command", help="the commands that make a row")
    command.add_argument("row", help="TABLE/ROW, as `list` prints it")
    command.add_argument("--processes", type=cli.positive, default=8, help="GPUs, 8 as published")
    show = actions.add_parser("show", help="published numbers beside measured ones, as Markdown")
    show.add_argument("--table", help="one table only; default all")
    show.add_argument("--out", type=cli.file_path, metavar="DIR", help="write DIR/tables.md")
    results = {"type": cli.file_path, "default": DEFAULT_RESULTS, "metavar": "DIR"}
    rows.add_argument("--results", **results, help="evaluation records")
    show.add_argument("--results", **results, help="evaluation records")
    add = actions.add_parser("digits", help="the paper's phenomenon on 2 CPU cores").add_argument
    seeds = {"type": cli.not_negative, "nargs": "+", "default": [0, 1], "metavar": "N"}
    add("--seeds", **seeds, help="one run per arm and seed")
    add("--jobs", type=cli.positive, default=2, help="runs at a time, which share the cores")
    add("--dry-run", action="store_true", help="print the commands, and stop")
    add("--measure", type=cli.file_path, metavar="DIR", help="only measure this run's folder")
    add("overrides", nargs="*", metavar="key=value", help="for every arm")
    args = parser.parse_args(argv)
    if getattr(args, "out", None):
        cli.check_output("--out", args.out / TABLES, written.MARKDOWN)
    cli.check_input("--measure", getattr(args, "measure", None), folder=True)
    if getattr(args, "results", DEFAULT_RESULTS) != DEFAULT_RESULTS:
        cli.check_input("--results", args.results, folder=True)
    return args


if __name__ == "__main__":
    cli.answer_help(parse_args)  # before the imports below, which take seconds

from utils.files import write_atomically
from utils.paper import showing, tables
from utils.paper.measured import find_measured


def main() -> None:
    args = parse_args()
    actions = {"list": list_rows, "command": print_command, "show": show, "digits": run_digits}
    actions[args.action](args)


def list_rows(args: argparse.Namespace) -> None:
    print("\n".join(showing.listing(tables.load_tables(), find_measured(args.results))))


def print_command(args: argparse.Namespace) -> None:
    published = tables.load_tables()
    row = tables.choose("row", args.row, tables.all_rows(published))
    table = published[row.name.split("/")[0]]
    print("\n".join(tables.command_lines(row, table, args.processes)))


def show(args: argparse.Namespace) -> None:
    published, found = tables.load_tables(), find_measured(args.results)
    chosen = [tables.choose("table", args.table, published)] if args.table else published.values()
    text = "\n".join(showing.markdown(table, found) for table in chosen)
    if args.out is None:
        print(text)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / TABLES, f"{written.MARKDOWN_MARK}\n{text}")
    print(f"written to {args.out / TABLES}")


def run_digits(args: argparse.Namespace) -> None:
    from utils.paper import digits_study  # the tables need none of the networks

    if args.measure:
        digits_study.measure_run(args.measure)
    elif args.dry_run:
        print("\n".join(digits_study.train_commands(args.seeds, args.overrides)))
    else:
        digits_study.run_study(args.seeds, args.jobs, args.overrides)


if __name__ == "__main__":
    cli.run(main)
