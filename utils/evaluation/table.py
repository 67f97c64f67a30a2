"""Several sets of samples against one reference: a table in which noise is not ranked.

A row per set: the number of images, each metric with its standard error, and whether the numbers
are comparable to papers. The best value of a column stands out only if it differs from every other
one by more than `SIGNIFICANT` standard errors of the difference. Frechet distances and recall
depend on the number of images: sets of different sizes are not ranked in them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from utils.distributed import Ranks
from utils.evaluation.evaluate import check_network, check_possible, evaluate, refuse_swapped
from utils.evaluation.images.image_sets import open_images
from utils.evaluation.metrics import METRICS, Metric
from utils.evaluation.networks import FeatureNet, load_network
from utils.evaluation.options import Options
from utils.evaluation.reference import Reference
from utils.evaluation.report import fixed, metric_name, with_error
from utils.process.written import MARKDOWN_MARK, TABLE_FORMAT

# standard errors of a difference beyond which it is not taken for noise: 95 % of a normal
SIGNIFICANT = 2.0


@dataclass
class Cell:
    """A number of the table; `best`: whether it is better than all others beyond the noise."""

    value: float
    error: float | None = None
    best: bool = False

    def __str__(self) -> str:
        return with_error(self.value, self.error)


@dataclass
class Table:
    """`metrics`: rows of `METRICS`, with the names above their columns; `records` of the sets, in
    the order given, and the numbers in each by their rows."""

    reference: str | None
    features: str
    metrics: dict[str, str]
    records: list[dict]
    cells: list[dict[str, Cell]]

    def head(self) -> list[str]:
        arrows = (f"{name} {'↑' if METRICS[row].higher_is_better else '↓'}"
                  for row, name in self.metrics.items())  # fmt: skip
        return ["samples", "images", *arrows, "comparable to papers"]

    def lines(self) -> list[list[tuple[str, bool]]]:
        """Cells as text, and whether each is the best of its column."""
        reasons, lines = self._reasons(), []
        for record, cells in zip(self.records, self.cells):
            numbers = [(str(cells[row]), cells[row].best) if row in cells else ("", False)
                       for row in self.metrics]  # fmt: skip
            why = tuple(record["not_comparable_because"])
            comparable = f"no ({reasons.index(why) + 1})" if why else "yes"
            text = [(record["samples"]["name"], False), (f"{record['n']:,}", False)]
            lines.append([*text, *numbers, (comparable, False)])
        return lines

    def notes(self) -> list[str]:
        """What has to be known with the numbers: a sentence each."""
        notes = [f"Reference: {self.reference or 'none'}. Features: {self.features}."]
        floors = {name: detail for record in self.records
                  for name, detail in record["details"].items() if "floor" in detail}  # fmt: skip
        notes += [f"{name}: two halves of the reference, {detail['floor_images']} images each, "
                  f"are {fixed(detail['floor'])} apart."
                  for name, detail in floors.items()]  # fmt: skip
        notes.append("±: one standard error, of other samples against the same reference. The best "
                     f"of a column stands out if it is {SIGNIFICANT:g} standard errors of the "
                     "difference from every other one.")  # fmt: skip
        for i, why in enumerate(self._reasons()):
            notes.append(f"({i + 1}) not comparable to papers: {'; '.join(why)}.")
        warned: dict[str, list[str]] = {}
        for record in self.records:
            for text in record["warnings"]:
                warned.setdefault(text, []).append(record["samples"]["name"])
        for text, names in warned.items():
            of = "" if len(names) == len(self.records) else f"{', '.join(names)}: "
            notes.append(f"Warning: {of}{text}.")
        return notes

    def _reasons(self) -> list[tuple[str, ...]]:
        found = (tuple(record["not_comparable_because"]) for record in self.records)
        return list(dict.fromkeys(why for why in found if why))

    def markdown(self) -> str:
        head, lines = self.head(), self.lines()
        text = [MARKDOWN_MARK, "", _markdown_line(head)]
        text.append("|---|" + "---:|" * (len(head) - 2) + "---|")
        text += [_markdown_line(f"**{cell}**" if best else cell for cell, best in line)
                 for line in lines]  # fmt: skip
        return "\n".join([*text, "", *(f"- {note}" for note in self.notes())]) + "\n"

    def as_json(self) -> dict:
        rows = [
            {"samples": record["samples"]["name"], "n": record["n"],
             "metrics": {self.metrics[row]: vars(cell) for row, cell in cells.items()},
             "comparable_to_papers": record["comparable_to_papers"],
             "not_comparable_because": record["not_comparable_because"]}
            for record, cells in zip(self.records, self.cells)
        ]  # fmt: skip
        return {"format": TABLE_FORMAT, "reference": self.reference, "features": self.features,
                "notes": self.notes(), "rows": rows, "records": self.records}  # fmt: skip


def _markdown_line(cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def evaluate_sets(
    sets: Sequence, reference, options: Options, *, ranks: Ranks,
    keep: Callable[[Table], object], progress: Callable | None = None,
) -> Table:  # fmt: skip
    """Measure each of `sets` against `reference` (as for `evaluate`) with standard errors. Network
    and reference are loaded once; all sets are checked before the first is measured. The main
    process calls `keep` with the table so far after each set: what comes next may fail."""
    options = replace(options, uncertainty=True)
    images = [open_images(each) for each in sets]
    target = None if reference is None else Reference(reference, images[0].size[0])
    for each in sets:
        refuse_swapped(each, reference)
    net = load_network(options, ranks)
    for each in images:
        check_network(net, each.size)
        check_possible(each, target, options.metrics, net)
    records: list[dict] = []
    for each in sets:
        own = evaluate(each, target, options, net=net, ranks=ranks, progress=progress)
        records.append(own)
        ranks.on_main(lambda: keep(make_table(records, net, reference)))
    return make_table(records, net, reference)


def make_table(records: list[dict], net: FeatureNet, reference) -> Table:
    """The table of records of `evaluate`, all by one network and against one reference."""
    same = len({record["n"] for record in records}) == 1
    cells = [_cells(record, net) for record in records]
    n = records[0]["n"] if same else 0
    columns = {row: metric_name(metric, net, n).removesuffix("@0")
               for row, metric in METRICS.items()
               if any(row in each for each in cells)}  # fmt: skip
    name = None if reference is None else str(reference)
    table = Table(name, net.label, columns, records, cells)
    for row in columns:
        column = [cells[row] for cells in table.cells if row in cells]
        if (same or METRICS[row].unbiased) and (first := best(column, METRICS[row])):
            first.best = True
    return table


def _cells(record: dict, net: FeatureNet) -> dict[str, Cell]:
    """The numbers of a record by their rows in `METRICS`."""
    names = {row: metric_name(metric, net, record["n"]) for row, metric in METRICS.items()}
    errors = {name: each.get("standard_error") for name, each in record["details"].items()}
    values = record["metrics"]
    return {r: Cell(values[name], errors.get(name)) for r, name in names.items() if name in values}


def best(column: Sequence[Cell], metric: Metric) -> Cell | None:
    """The best cell of a column, if that is no noise: None if there are no others, if a standard
    error is missing, or if one is within `SIGNIFICANT` standard errors of the difference."""
    sign = -1 if metric.higher_is_better else 1
    first, *others = sorted(column, key=lambda cell: sign * cell.value)
    for other in others:
        if first.error is None or other.error is None:
            return None
        noise = SIGNIFICANT * (first.error**2 + other.error**2) ** 0.5
        if not abs(first.value - other.value) > noise:
            return None
    return first if others else None
