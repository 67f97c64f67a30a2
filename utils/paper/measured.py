"""Measurements: which row of the paper's tables a record of evaluate_fid.py belongs to, and
whether its numbers may stand beside the published ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from models.checks.errors import UserError
from utils.config.load import CONFIG_FILE, read_saved_config
from utils.config.resuming import changed_settings, is_same_experiment
from utils.config.schema import Config
from utils.evaluation.metrics import PAPER_SIZE
from utils.evaluation.options import REFERENCES, sampling_settings
from utils.evaluation.references.known import KNOWN
from utils.files import read_record
from utils.paper.tables import METRIC_NAMES, PR_MODE, ROOT, TableRow, published_sampling
from utils.sampling.settings import ADDED

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
        """The five numbers of a table; None for those that were not measured or, by the record, may
        not stand beside published ones."""
        against = reasons_against(self.record)
        return [None if against.get(name) else self.record["metrics"].get(name)
                for name in METRIC_NAMES]  # fmt: skip


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
    against = reasons_against(record)
    if not reasons:  # of a record without "comparability", all that it says is about the gFID
        whole = record.get("not_comparable_because") or []
        reasons = against.get(METRIC_NAMES[0], whole)
    differs = [f"no {name.removesuffix('-50K')}: {'; '.join(against[name])}"
               for name in METRIC_NAMES[1:] if against.get(name)]  # fmt: skip
    return Measured(path, record, reasons, [*differences(row, row.load(), record), *differs])


def reasons_against(record: dict) -> dict[str, list[str]]:
    """Of each metric why it is not comparable, by the record; {} if that does not say so."""
    found = record.get("comparability")
    return found if isinstance(found, dict) else {}


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
    reference, wanted = record.get("reference") or {}, REFERENCES[resolution]
    known = KNOWN.get(reference.get("file_sha256", ""))
    if known is None or known.name != wanted:
        name = Path(reference.get("name", "unknown")).name
        yield f"reference {name}, whose sha256 is not known to be that of {wanted}"
    if record["samples"].get("size") != [resolution] * 2:
        yield f"images of {record['samples'].get('size')} pixels, not {resolution}"


def differences(row: TableRow, config: Config, record: dict) -> Iterator[str]:
    """What to know when comparing: sampling, precision and recall, training."""
    beside = record["samples"]["record"]
    yield from sampling_differences(row, config, sampling_settings(beside))
    mode = record.get("protocol", {}).get("precision_recall", {}).get("mode", PR_MODE)
    if mode != PR_MODE and not reasons_against(record):  # else it is among these
        yield f"precision and recall {mode}, not {PR_MODE}"
    yield from training_differences(config, Path(beside["checkpoint"]))


def sampling_differences(row: TableRow, config: Config, used: dict) -> Iterator[str]:
    """Where samples were drawn with other settings than the published ones."""
    published, used = ADDED | published_sampling(row).that_decide_pixels(), ADDED | used
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
