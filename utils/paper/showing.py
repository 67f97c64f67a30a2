"""The paper's tables as text and as Markdown: published numbers beside measured ones."""

from collections.abc import Iterator, Mapping

from utils.evaluation.metrics import PAPER_SIZE
from utils.paper.measured import Measured, measured_of
from utils.paper.tables import METRIC_NAMES, Table, TableRow, numbers

HEAD = "| row | published | measured, same protocol | measured, protocol differs | differences |"
COLUMNS = " / ".join(name.removesuffix("-50K") for name in METRIC_NAMES)


def listing(tables: Mapping[str, Table], found: list[Measured]) -> Iterator[str]:
    """A line for each row, one for each of its measurements, one for each record of no row."""
    used = set()
    for table in tables.values():
        yield f"\nTable {table.key}: {table.title}"
        for name, row in table.rows.items():
            how = f"{row.config} @ {row.step:,}" if row.config else f"published only: {row.only}"
            yield f"  {name:<30} {numbers(row.metrics):<36} {how}"
            for m in measured_of(row, found):
                used.add(m.path)
                yield f"{'':33}{summary(m)}"
    yield f"\npublished: {COLUMNS} of {PAPER_SIZE:,} images"
    for m in found:
        if m.path not in used:
            yield f"of no row: {m.path}"


def summary(m: Measured) -> str:
    """One line about a measurement. Numbers that are not comparable are not shown."""
    if m.not_comparable:
        return f"not comparable ({'; '.join(m.not_comparable)}): {m.path}"
    remark = f", but {'; '.join(m.differs)}" if m.differs else ", same protocol"
    return f"measured {numbers(m.values)}{remark}: {m.path}"


def markdown(table: Table, found: list[Measured]) -> str:
    """One table, then what may not stand in it, then where the numbers are from."""
    lines = [f"## Table {table.key}: {table.title}", "", COLUMNS, "", HEAD, "|---|---|---|---|---|"]
    excluded = []
    for name, row in table.rows.items():
        own = measured_of(row, found)
        lines += table_lines(row, [m for m in own if not m.not_comparable])
        excluded += [excluded_line(name, m) for m in own if m.not_comparable]
    if excluded:
        lines += ["", "**Not comparable with the published numbers**:", "", *excluded]
    lines += ["", f"Source: {table.source}. Confidence {table.confidence}.", table.note]
    return "\n".join(lines).rstrip("\n") + "\n"


def table_lines(row: TableRow, measured: list[Measured]) -> list[str]:
    head = f"| {row.name} | {numbers(row.metrics)} |"
    if not measured:
        return [f"{head} | | {f'published only: {row.only}' if row.only else ''} |"]
    return [
        f"{head} | {numbers(m.values)} | {in_a_cell('; '.join(m.differs))} |"
        if m.differs
        else f"{head} {numbers(m.values)} | | |"
        for m in measured
    ]


def in_a_cell(text: str) -> str:
    """A text that may name files: a bar in it would end the cell."""
    return " ".join(text.replace("|", "\\|").splitlines())


def excluded_line(name: str, m: Measured) -> str:
    metrics = m.record["metrics"].items()
    values = ", ".join(f"{k} {v:.4f}" for k, v in metrics if isinstance(v, int | float))
    return f"- {name}: {values} ({'; '.join([*m.not_comparable, *m.differs])}; `{m.path}`)"
