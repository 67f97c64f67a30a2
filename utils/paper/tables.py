"""The tables of the paper: rows with their published numbers, and the commands that make a row."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from models.checks.errors import UserError
from utils.config.load import load_config
from utils.config.schema import Config
from utils.evaluation.metrics import METRICS, PAPER_SIZE
from utils.evaluation.options import REFERENCES
from utils.sampling.settings import SamplingSettings, flag_of

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = Path(__file__).with_name("published.yaml")
# the columns of every table, as evaluate_fid.py --metrics, and their names in its records
COLUMNS = ("fid", "sfid", "is", "precision", "recall")
DECIMALS = (2, 2, 1, 2, 2)  # with which papers print them
METRIC_NAMES = [METRICS[name].published["inception"][0] for name in COLUMNS]
PR_MODE = "adm_fp16"  # how the published precision and recall were computed
PUBLISHED_SAMPLING = SamplingSettings(
    solver="sde", steps=250, guidance_low=0.0, uint8="truncate", precision="fp32", tf32=True
)


class Printed(float):
    """A number as a paper has it: `text` keeps its zeros, 4.70."""

    def __init__(self, text: str):
        self.text = text


class PrintedLoader(yaml.SafeLoader):
    """Reads every number with a point as a `Printed` one."""


PrintedLoader.add_constructor("tag:yaml.org,2002:float", lambda _, node: Printed(node.value))


@dataclass(frozen=True)
class TableRow:
    name: str  # TABLE/ROW
    metrics: list[float]  # as many as are printed, in the order of `COLUMNS`
    config: str | None = None  # file under configs/, without .yaml
    step: int = 0  # of the checkpoint that is measured
    balanced: bool = False  # whether every class has equally many samples
    cfg_scale: float = 1.0
    guidance_high: float = 1.0
    only: str | None = None  # why this code cannot make the row; then it has no config

    def load(self) -> Config:
        return cached_config(ROOT / self.path)

    @property
    def path(self) -> str:
        return f"configs/{self.config}.yaml"

    @property
    def tag(self) -> str:
        """Name of the row's samples and of its record. Rows of several tables can share them."""
        guided = f"-cfg{self.cfg_scale:g}" if self.cfg_scale != 1 else ""
        return f"{self.step:07d}{'-balanced' * self.balanced}{guided}"

    def gpu_hours(self) -> float:
        """The least GPU-hours that the training takes, from the header of the config."""
        header = (ROOT / self.path).read_text().split("\nbase:")[0]
        (hours,) = re.findall(r"about ([\d,]+) GPU-hours", header)
        return float(hours.replace(",", "")) * self.step / self.load().run.steps


@cache
def cached_config(path: Path) -> Config:
    return load_config([path])


@dataclass(frozen=True)
class Table:
    key: str  # number of the table, or "readme"
    title: str
    source: str  # document, version and table
    confidence: str  # A: read in the paper's full text; B: in a README or an independent re-run
    rows: dict[str, TableRow]  # by the row's full name
    note: str = ""


def load_tables() -> dict[str, Table]:
    """The tables of published.yaml by key, in the order of the file."""
    data, tables = PrintedLoader(PUBLISHED.read_text()).get_single_data(), {}
    for key, table in data["tables"].items():
        rows = {f"{key}/{name}": row for name, row in table["rows"].items()}
        rows = {name: TableRow(name, **row) for name, row in rows.items()}
        source = table["source"].format(paper=data["paper"], readme=data["readme"])
        tables[key] = Table(**table | {"key": key, "source": source, "rows": rows})
    return tables


def all_rows(tables: Mapping[str, Table]) -> dict[str, TableRow]:
    return {name: row for table in tables.values() for name, row in table.rows.items()}


def choose(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """The table or row of that name; `UserError` with the nearest name if there is none."""
    if name in known:
        return known[name]
    (nearest,) = get_close_matches(name, known, n=1, cutoff=0)
    raise UserError(f"no {kind} {name}: nearest is {nearest}; `list` prints them all")


def published_sampling(row: TableRow) -> SamplingSettings:
    """How the samples behind the row's numbers were drawn."""
    own = {"guidance_high": row.guidance_high, "class_balanced": row.balanced}
    return replace(PUBLISHED_SAMPLING, cfg_scale=row.cfg_scale, **own)


def commands(row: TableRow, processes: int = 8) -> list[list[str]]:
    """The words of the three commands that make a row: train, sample, evaluate."""
    if row.only:
        raise UserError(f"{row.name} is published only: {row.only}")
    config = row.load()
    samples = f"samples/{config.run.name}-{row.tag}.npz"
    launch = ["accelerate", "launch", "--num_processes", str(processes)]
    train = [*launch, "train_repae.py", "--config", row.path]
    if row.step < config.run.steps:
        train.append(f"run.steps={row.step}")
    checkpoint = f"{config.run_dir}/checkpoints/{row.step:07d}"
    sample = [*launch, "sample_ddp.py", "--checkpoint", checkpoint, "--out", samples]
    sample += ["--num-samples", str(PAPER_SIZE), *flags(published_sampling(row))]
    evaluate = ["python", "evaluate_fid.py", "--samples", samples]
    evaluate += ["--reference", REFERENCES[config.data.resolution], "--features", "inception"]
    evaluate += ["--metrics", ",".join(COLUMNS), "--pr-mode", PR_MODE]
    evaluate += ["--out", f"{config.run_dir}/evaluation-{row.tag}.json"]
    return [train, sample, evaluate]


def flags(settings: SamplingSettings) -> list[str]:
    """The flags of sample_ddp.py that ask for these images, defaults included."""
    words = []
    for name, value in settings.that_decide_pixels().items():
        if isinstance(value, bool):
            words += [flag_of(name)] * value
        elif value is not None:
            words += [flag_of(name), str(value)]
    return words


def command_lines(row: TableRow, table: Table, processes: int = 8) -> list[str]:
    """The commands as lines to paste, after comments: what is published, and what it costs."""
    words, config = commands(row, processes), row.load()
    lines = [
        f"# {row.name}, published {numbers(row.metrics)}: {table.source}",
        f"# step {row.step:,}: {row.gpu_hours():,.0f} GPU-hours by FLOPs at least;",
        f"# the published runs trained in fp16, this one in {config.run.precision}",
    ]
    if config.uses_disc and config.vae.weights:
        lines += [
            "# and from a trained discriminator: disc.weights=FILE, if you have it; else it can",
            "# learn first: disc.pretrain_steps=N, run.steps and the checkpoint larger by N",
        ]
    return lines + [shlex.join(command) for command in words]


def numbers(values: Sequence[float | None]) -> str:
    """The five numbers of a row in one cell."""
    return " / ".join(printed(values))


def printed(values: Sequence[float | None]) -> list[str]:
    """The five numbers of a row, or the first of them: published ones as they stand in the paper,
    measured ones with as many decimals."""

    def text(value: float | None, decimals: int) -> str:
        if value is None:
            return "-"
        return value.text if isinstance(value, Printed) else f"{value:.{decimals}f}"

    return [text(value, decimals) for value, decimals in zip(values, DECIMALS)]
