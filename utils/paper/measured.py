"""Measurements: which row of the paper's tables a record of evaluate_fid.py belongs to, and
whether its numbers may stand beside the published ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import UserError
from utils.config.load import CONFIG_FILE, read_saved_config
from utils.config.resuming import changed_settings, is_same_experiment
from utils.config.schema import Config
from utils.evaluation.metrics import PAPER_SIZE
from utils.evaluation.options import REFERENCES, sampling_settings
from utils.files import read_record
from utils.paper.tables import METRIC_NAMES, PR_MODE, ROOT, TableRow, published_sampling

LARGEST_RECORD = 2**20  # bytes of a .json that is opened


@dataclass
class Measured:
    """A record of evaluate_fid.py, and how it compares with what was published for its row."""

    path: Path
    record: dict
    not_comparable: list[str] = field(default_factory=list)  # reasons; then it enters no table
    differs: list[str] = field(default_factory=list)  # what to know when comparing

    @property
    def values(self) -> list[float | None]:
        """The five numbers of a table; None for those that were not measured."""
        return [self.record["metrics"].get(name) for name in METRIC_NAMES]


def find_measured(folder: Path) -> list[Measured]:
    """Every record of samples below `folder`."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        record = read_record(path) if path.stat().st_size <= LARGEST_RECORD else None
        if record and {"metrics", "samples", "features", "n"} <= set(record):
            found.append(Measured(path, record))
    return found


def measured_of(row: TableRow, found: list[Measured]) -> list[Measured]:
    """The records that belong to `row`, compared with it."""
    if row.config is None:
        return []
    own = (Path(row.config).name, row.step, row.cfg_scale != 1)  # a run has its config's name
    return [compared(row, m.path, m.record) for m in found if origin(m.record) == own]


def compared(row: TableRow, path: Path, record: dict) -> Measured:
    reasons = [*reasons_not_comparable(row.load(), record)]
    reasons = reasons or record.get("not_comparable_because", [])
    return Measured(path, record, reasons, [*differences(row, row.load(), record)])


def origin(record: dict) -> tuple[str, int, bool] | None:
    """(run, step, with guidance?) of the samples; None if they are of no run's checkpoint."""
    beside = record["samples"].get("record") or {}
    parts = Path(beside.get("checkpoint", "")).parts
    if len(parts) < 3 or parts[-2] != "checkpoints" or not parts[-1].isdigit():
        return None
    return parts[-3], int(parts[-1]), sampling_settings(beside).get("cfg_scale", 1) != 1


def reasons_not_comparable(config: Config, record: dict) -> Iterator[str]:
    """Why the numbers may not stand beside published ones, whatever the record says of itself."""
    if record["n"] != PAPER_SIZE:
        yield f"{record['n']} images, not {PAPER_SIZE}"
    features = record["features"] or {}
    if features.get("label") != "inception" or not features.get("published_weights"):
        yield f"feature network {features.get('label')}, not the published inception"
    if METRIC_NAMES[0] not in record["metrics"]:
        yield f"no {METRIC_NAMES[0]} in the record"
    resolution = config.data.resolution
    reference = Path((record.get("reference") or {}).get("name", "unknown")).name
    if reference != REFERENCES[resolution]:
        yield f"reference {reference}, not {REFERENCES[resolution]}"
    if record["samples"].get("size") != [resolution] * 2:
        yield f"images of {record['samples'].get('size')} pixels, not {resolution}"


def differences(row: TableRow, config: Config, record: dict) -> Iterator[str]:
    """What to know when comparing: sampling, precision and recall, training."""
    beside = record["samples"]["record"]
    yield from sampling_differences(row, config, sampling_settings(beside))
    mode = record.get("protocol", {}).get("precision_recall", {}).get("mode", PR_MODE)
    if mode != PR_MODE:
        yield f"precision and recall {mode}, not {PR_MODE}"
    yield from training_differences(config, Path(beside["checkpoint"]))


def sampling_differences(row: TableRow, config: Config, used: dict) -> Iterator[str]:
    """Where samples were drawn with other settings than the published ones."""
    published = published_sampling(row).that_decide_pixels()
    published["path"] = config.loss.diffusion.path
    unguided = ("guidance_low", "guidance_high") if row.cfg_scale == 1 else ()
    words = {True: "balanced", False: "random"}
    for name, value in published.items():
        got = used.get(name, "unknown")
        if got == value or name in ("seed", "compile", *unguided):
            continue
        if name == "class_balanced":
            yield f"labels {words.get(got, 'unknown')}, not {words[value]}"
        else:
            yield f"{name} {got}, not {value}"


def training_differences(config: Config, checkpoint: Path) -> Iterator[str]:
    """Where the run's saved settings are not those of the row's config."""
    try:
        saved = read_saved_config(ROOT / checkpoint.parents[1] / CONFIG_FILE)
    except UserError:
        yield "training settings unknown"
        return
    for name, (value, trained) in changed_settings(config, saved).items():
        if not is_same_experiment(name):
            yield f"trained with {name}={trained}, not {value}"
