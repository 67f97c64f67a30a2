"""The tables of the paper: what a row takes, what has been measured, and both side by side.

    python scripts/reproduce_tables.py list                      # rows, and what was measured
    python scripts/reproduce_tables.py command 7/init-400k       # train, sample, evaluate
    python scripts/reproduce_tables.py show --table 7 --out DIR  # Markdown and PNG
    python scripts/reproduce_tables.py digits                    # the phenomenon on a CPU

Published numbers: scripts/published.yaml. Measured ones: records of `evaluate_fid.py --out` under
--results; one belongs to the row whose run and step its samples came from. A record of fewer
images, of another feature network or reference never stands in a table: it is listed below it.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import UserError
from models.vae import VAES
from scripts import digits_experiment
from utils import cli
from utils.config import Config, flat, load_config
from utils.image_sets import sampling_settings
from utils.report import PAPER_SIZE

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "scripts" / "published.yaml"
METRICS = ("gFID-50K", "sFID-50K", "IS-50K", "precision", "recall")
REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
PR_MODE = "adm_fp16"
SUSTAINED = 200e12  # FLOP/s of one GPU, which LightningDiT reaches on an H800
LARGEST_RECORD = 2**20  # bytes of a .json that is opened

# Settings of a run that leave the numbers of its row as they are; `steps` is only where it ends.
# fmt: off
IRRELEVANT = {
    "run": {"name", "out", "seed", "steps", "accumulation", "compile", "gradient_checkpointing",
            "channels_last", "resume", "log_every", "save_every", "keep_last", "milestone_every",
            "trackers"},
    "data": {"source", "path", "workers", "latents"},
    "encoder": {"cached"},
    "preview": None,  # all of it
    "eval": None,
}
# fmt: on


@dataclass(frozen=True)
class Row:
    """One line of a published table."""

    name: str  # TABLE/ROW
    metrics: list[float]  # as many of METRICS as are printed
    config: str | None = None  # under configs/, without .yaml
    step: int | None = None
    balanced: bool = False
    cfg_scale: float = 1.0
    guidance_high: float = 1.0
    only: str | None = None  # why it is published only

    def load(self) -> Config:
        return _load(self.path)

    @property
    def path(self) -> str:
        return f"configs/{self.config}.yaml"

    @property
    def tag(self) -> str:
        """Of the samples: rows of several tables share them."""
        guided = f"-cfg{self.cfg_scale:g}" if self.cfg_scale != 1 else ""
        return f"{self.step:07d}{'-balanced' * self.balanced}{guided}"


@cache
def _load(path: str) -> Config:
    return load_config([ROOT / path])


@dataclass
class Measured:
    """A record of evaluate_fid.py, and how it differs from what was published for its row."""

    path: Path
    record: dict
    barred: list[str] = field(default_factory=list)  # why no published number is comparable
    differs: list[str] = field(default_factory=list)  # what to know when comparing


def main() -> None:
    args = parse_args()
    tables = load_tables()
    args.action(args, tables)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.split("\n")[0])
    actions = parser.add_subparsers(required=True, metavar="list | command | show | digits")
    one = actions.add_parser("list", help="rows, with what has been measured")
    one.set_defaults(action=list_rows)
    two = actions.add_parser("command", help="the commands that make a row")
    two.add_argument("row", help="TABLE/ROW, as `list` prints it")
    two.add_argument("--processes", type=int, default=8, help="GPUs; the published runs used 8")
    two.set_defaults(action=print_commands)
    three = actions.add_parser("show", help="published numbers beside measured ones")
    three.add_argument("--table", help="one table only; default all")
    three.add_argument("--out", type=Path, help="folder for tables.md and table-T.png")
    three.set_defaults(action=show)
    four = actions.add_parser("digits", help="the paper's phenomenon on 2 CPU cores")
    digits_experiment.add_arguments(four)
    four.set_defaults(action=lambda args, _: digits_experiment.main(args))
    for parser_of_results in (one, three):
        parser_of_results.add_argument("--results", type=Path, default=ROOT / "exps", metavar="DIR")
    return parser.parse_args(argv)


def load_tables() -> dict[str, dict]:
    """Table name => title, source, confidence, note and `rows`, in the order of the file."""
    data = yaml.safe_load(PUBLISHED.read_text())
    for key, table in data["tables"].items():
        table["source"] = table["source"].format(paper=data["paper"], readme=data["readme"])
        rows = table["rows"].items()
        table["rows"] = {f"{key}/{name}": Row(f"{key}/{name}", **row) for name, row in rows}
    return data["tables"]


def all_rows(tables: dict[str, dict]) -> dict[str, Row]:
    return {name: row for table in tables.values() for name, row in table["rows"].items()}


def pick(kind: str, name: str, known: dict):
    if name in known:
        return known[name]
    (nearest,) = get_close_matches(name, known, n=1, cutoff=0)
    raise UserError(f"no {kind} {name}: nearest is {nearest}; `list` prints them all")


# --------------------------------------------------------------------------------------
# What a row takes.


def sampling(row: Row) -> dict:
    """The published protocol, as settings of sample_ddp.py."""
    return {
        "num_samples": PAPER_SIZE,
        "solver": "sde",
        "steps": 250,
        "cfg_scale": row.cfg_scale,
        "guidance_low": 0.0,
        "guidance_high": row.guidance_high,
        "class_balanced": row.balanced,
        "uint8": "truncate",
        "precision": "fp32",
        "tf32": True,
    }


def commands(row: Row, processes: int = 8) -> list[list[str]]:
    """Words of the three commands: train, sample, evaluate."""
    if row.only:
        raise UserError(f"{row.name} is published only: {row.only}")
    config = row.load()
    samples = f"samples/{config.run.name}-{row.tag}.npz"
    launch = ["accelerate", "launch", "--num_processes", str(processes)]
    train = [*launch, "train_repae.py", "--config", row.path]
    if row.step < config.run.steps:
        train.append(f"run.steps={row.step}")
    sample = [*launch, "sample_ddp.py", "--checkpoint"]
    sample += [str(config.run_dir / "checkpoints" / f"{row.step:07d}"), "--out", samples]
    for name, value in sampling(row).items():
        flag = f"--{name.replace('_', '-')}"
        sample += ([flag] * value) if isinstance(value, bool) else [flag, str(value)]
    metrics = "fid,sfid,is,precision,recall"
    evaluate = ["python", "evaluate_fid.py", "--samples", samples, "--reference"]
    evaluate += [REFERENCES[config.data.resolution], "--features", "inception"]
    evaluate += ["--metrics", metrics, "--pr-mode", PR_MODE]
    evaluate += ["--out", str(config.run_dir / f"evaluation-{row.tag}.json")]
    return [train, sample, evaluate]


def training_gmac(c: Config) -> float:
    """Multiply-adds / 1e9 of one training image; a backward pass counts as two forward passes."""
    g = yaml.safe_load(PUBLISHED.read_text())["gmac"]
    area, shape = (c.data.resolution / 256) ** 2, c.sit_shape()
    attention = 2 * 256**2 * shape["hidden_size"] * shape["depth"] / 1e9  # quadratic in the tokens
    sit = (g["sit"][c.sit.size.split("/")[0]] - attention) * area + attention * area**2
    teachers = sum(g["encoder"][name] for name in c.encoder.names) * area if c.uses_encoder else 0
    kind = VAES[c.vae.name].architecture
    encode, decode = g["vae_encoder"][kind] * area, g["vae_decoder"][kind] * area
    if not c.vae.train:
        return 3 * sit + teachers + encode
    blocks = shape["depth"] if c.loss.diffusion.to_vae else c.loss.align.depth
    through_sit = 2 * sit * blocks / shape["depth"]  # forward, and backward to its input alone
    lpips = 3 * g["lpips"] * area if c.loss.reg.lpips else 0  # both images, backward to one
    disc = 8 * g["discriminator"] * area if c.uses_disc else 0  # 2 in the VAE phase, 6 in its own
    return 3 * sit + teachers + 3 * (encode + decode) + through_sit + lpips + disc


def gpu_hours(c: Config, steps: int) -> float:
    """At SUSTAINED FLOP/s, a multiply-add being two: a lower bound."""
    return training_gmac(c) * 2e9 * steps * c.run.batch_size / SUSTAINED / 3600


def print_commands(args: argparse.Namespace, tables: dict[str, dict]) -> None:
    row = pick("row", args.row, all_rows(tables))
    words = commands(row, args.processes)
    config, table = row.load(), tables[row.name.split("/")[0]]
    print(f"# {row.name}, published {numbers(row.metrics)}: {table['source']}")
    print(f"# step {row.step:,}: {gpu_hours(config, row.step):,.0f} GPU-hours by FLOPs at least;")
    print(f"# the published runs trained in fp16, this one in {config.run.precision}")
    if config.uses_disc and config.vae.weights:
        print("# and from a trained discriminator: disc.weights=FILE, if you have it; else it can")
        print("# learn first: disc.alone_steps=N, run.steps and the checkpoint larger by N")
    for command in words:
        print(shlex.join(command))


# --------------------------------------------------------------------------------------
# What was measured.


def find_measured(folder: Path) -> list[Measured]:
    """Every record of samples under `folder`."""
    if not folder.exists():
        return []
    found = []
    for path in sorted(folder.rglob("*.json")):
        record = read_json(path)
        if isinstance(record, dict) and {"metrics", "samples", "features", "n"} <= set(record):
            found.append(Measured(path, record))
    return found


def read_json(path: Path):
    """None for what is no evaluation record for sure: too large, or no JSON."""
    if path.stat().st_size > LARGEST_RECORD:
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def origin(record: dict) -> tuple[str, int, bool] | None:
    """(run, step, guided?) of the samples; None if they are of no run's checkpoint."""
    beside = record["samples"].get("record") or {}
    parts = Path(beside.get("checkpoint", "")).parts
    if len(parts) < 3 or parts[-2] != "checkpoints" or not parts[-1].isdigit():
        return None
    return parts[-3], int(parts[-1]), sampling_settings(beside).get("cfg_scale", 1) != 1


def measured_of(row: Row, found: list[Measured]) -> list[Measured]:
    """The records that belong to `row`, judged against it."""
    if row.only:
        return []
    own = (Path(row.config).name, row.step, row.cfg_scale != 1)  # a run has its file's name
    return [judge(row, row.load(), m) for m in found if origin(m.record) == own]


def judge(row: Row, config: Config, m: Measured) -> Measured:
    barred = list(bars(config, m.record)) or m.record.get("not_comparable_because", [])
    return Measured(m.path, m.record, barred, list(differences(row, config, m.record)))


def bars(config: Config, record: dict) -> Iterator[str]:
    """Why the numbers may not stand beside published ones, whatever the record says of itself."""
    if record["n"] != PAPER_SIZE:
        yield f"{record['n']} images, not {PAPER_SIZE}"
    features = record["features"] or {}
    if features.get("label") != "inception" or not features.get("published_weights"):
        yield f"feature network {features.get('label')}, not the published inception"
    if METRICS[0] not in record["metrics"]:
        yield f"no {METRICS[0]} in the record"
    name = Path((record.get("reference") or {}).get("name", "unknown")).name
    if name != REFERENCES[config.data.resolution]:
        yield f"reference {name}, not {REFERENCES[config.data.resolution]}"
    size = record["samples"].get("size")
    if size != [config.data.resolution] * 2:
        yield f"images of {size} pixels, not {config.data.resolution}"


def differences(row: Row, config: Config, record: dict) -> Iterator[str]:
    """What to know when comparing: sampling, precision/recall, training."""
    sampled = sampling_settings(record["samples"].get("record"))
    wanted = sampling(row) | {"timestep_shift": 1.0, "path": config.loss.diffusion.path}
    unguided = ("guidance_low", "guidance_high") if row.cfg_scale == 1 else ()
    for name, value in wanted.items():
        got = sampled.get(name, "unknown")
        if name not in (*unguided, "num_samples") and got != value:
            yield f"{name} {got}, not {value}" if name != "class_balanced" else labels(got, value)
    mode = record.get("protocol", {}).get("precision_recall", {}).get("mode", PR_MODE)
    if mode != PR_MODE:
        yield f"precision and recall {mode}, not {PR_MODE}"
    yield from training_differences(config, Path(record["samples"]["record"]["checkpoint"]))


def labels(got, value: bool) -> str:
    words = {True: "balanced", False: "random"}
    return f"labels {words.get(got, 'unknown')}, not {words[value]}"


def training_differences(config: Config, checkpoint: Path) -> Iterator[str]:
    """Where the run's saved settings are not those of the row's config."""
    saved = ROOT / checkpoint.parents[1] / "config.yaml"
    try:
        trained = flat(asdict(load_config([saved])))
    except UserError:
        yield "training settings unknown"
        return
    for name, value in flat(asdict(config)).items():
        if trained.get(name) != value and not irrelevant(*name.split(".", 1)):
            yield f"trained with {name}={trained.get(name)}, not {value}"


def irrelevant(group: str, name: str) -> bool:
    names = IRRELEVANT.get(group, set())
    return names is None or name in names


# --------------------------------------------------------------------------------------
# Both side by side.


def numbers(values: list[float | None]) -> str:
    return " / ".join("-" if v is None else f"{v:.4g}" for v in values)


def values_of(m: Measured) -> list[float | None]:
    return [m.record["metrics"].get(name) for name in METRICS]


def list_rows(args: argparse.Namespace, tables: dict[str, dict]) -> None:
    found = find_measured(args.results)
    used = set()
    for key, table in tables.items():
        print(f"\nTable {key}: {table['title']}")
        for name, row in table["rows"].items():
            own = measured_of(row, found)
            used |= {m.path for m in own}
            how = f"{row.config} @ {row.step:,}" if row.config else f"published only: {row.only}"
            print(f"  {name:<30} {numbers(row.metrics):<36} {how}")
            for m in own:
                print(f"{'':33}{summary(m)}")
    others = [m.path for m in found if m.path not in used]
    print(f"\npublished: gFID / sFID / IS / precision / recall of {PAPER_SIZE:,} images")
    for path in others:
        print(f"of no row: {path}")


def summary(m: Measured) -> str:
    if m.barred:
        return f"not comparable ({'; '.join(m.barred)}): {m.path}"
    remark = f", but {'; '.join(m.differs)}" if m.differs else ", same protocol"
    return f"measured {numbers(values_of(m))}{remark}: {m.path}"


def show(args: argparse.Namespace, tables: dict[str, dict]) -> None:
    chosen = {args.table: pick("table", args.table, tables)} if args.table else tables
    found = find_measured(args.results)
    pages = []
    for key, table in chosen.items():
        own = {name: measured_of(row, found) for name, row in table["rows"].items()}
        picture = f"table-{key}.png" if args.out else None
        pages.append(markdown(key, table, own, picture))
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            draw(key, table, own, args.out / picture)
    if not args.out:
        print("\n".join(pages))
        return
    (args.out / "tables.md").write_text("\n".join(pages))
    print(f"written to {args.out}: tables.md and {len(pages)} table-*.png")


def markdown(key: str, table: dict, own: dict[str, list[Measured]], picture: str | None) -> str:
    """One table, then what may not stand in it, then where the numbers are from."""
    lines = [f"## Table {key}: {table['title']}", "", "gFID / sFID / IS / precision / recall", ""]
    lines += [
        "| row | published | measured, same protocol | measured, protocol differs | differences |"
    ]
    lines += ["|---|---|---|---|---|"]
    aside = []
    for name, row in table["rows"].items():
        lines += table_lines(row, [m for m in own[name] if not m.barred])
        aside += [aside_line(name, m) for m in own[name] if m.barred]
    if aside:
        lines += ["", "**Not comparable with the published numbers**:", "", *aside]
    lines += ["", f"Source: {table['source']}. Confidence {table['confidence']}."]
    lines += [table["note"]] if "note" in table else []
    lines += ["", f"![gFID of table {key}]({picture})"] if picture else []
    return "\n".join([*lines, ""])


def table_lines(row: Row, measured: list[Measured]) -> list[str]:
    """A line for each measurement, or a single one without."""
    head = f"| {row.name} | {numbers(row.metrics)} |"
    if not measured:
        return [f"{head} | | {'published only: ' + row.only if row.only else ''} |"]
    return [
        f"{head} | {numbers(values_of(m))} | {'; '.join(m.differs)} |"
        if m.differs
        else f"{head} {numbers(values_of(m))} | | |"
        for m in measured
    ]


def aside_line(name: str, m: Measured) -> str:
    metrics = m.record["metrics"].items()
    values = ", ".join(f"{k} {v:.4g}" for k, v in metrics if isinstance(v, int | float))
    return f"- {name}: {values} ({'; '.join([*m.barred, *m.differs])}; `{m.path}`)"


def draw(key: str, table: dict, own: dict[str, list[Measured]], out: Path) -> None:
    """gFID: published grey; measured blue, hatched where the protocol differs. Of several measured
    ones, that with the fewest differences."""
    figure, axis = plt.subplots(figsize=(8, 1.3 + 0.42 * len(own)), layout="constrained")
    for y, (name, row) in enumerate(table["rows"].items()):
        bar(axis, y - 0.2, row.metrics[0], "#b9b9b9", "published")
        for m in sorted((m for m in own[name] if not m.barred), key=lambda m: len(m.differs))[:1]:
            label = "measured, protocol differs" if m.differs else "measured, same protocol"
            hatch = "///" if m.differs else None
            bar(axis, y + 0.2, m.record["metrics"][METRICS[0]], "#1f5fa8", label, hatch)
    axis.set_yticks(range(len(own)), list(own))
    axis.invert_yaxis()
    axis.set_xscale("log" if max(r.metrics[0] for r in table["rows"].values()) > 100 else "linear")
    axis.set(title=f"Table {key}: {table['title']}", xlabel="gFID of 50,000 images")
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    handles = {h.get_label(): h for h in axis.containers}
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def bar(axis, y: float, value: float, color: str, label: str, hatch: str | None = None) -> None:
    face = "white" if hatch else color
    bars_drawn = axis.barh(y, value, 0.38, color=face, edgecolor=color, hatch=hatch, label=label)
    axis.bar_label(bars_drawn, fmt="%.4g", padding=3, fontsize=8)


if __name__ == "__main__":
    cli.run(main)
