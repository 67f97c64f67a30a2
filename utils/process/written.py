"""The kinds of files that the scripts write, and how one is told from a file of somebody else: only
what this program has written itself is ever written over.

Pictures, pages and Markdown carry the name of the program, records are known by their keys.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from models.checks.errors import UserError
from models.checks.file_kinds import read_json

PROGRAM = "REPA-E"  # in the metadata of what is written
GENERATOR = f"{PROGRAM} scripts/report.py"  # of the HTML pages
MARKDOWN_MARK = f"<!-- {PROGRAM} -->"  # first line of a page of Markdown
HEAD = 2**16  # bytes in which a mark stands
LONGEST_JSON = 2**26  # bytes; no record is longer


class Kind(NamedTuple):
    """A kind of file: the endings of its name, what it is in words, and whether a file is one.
    Without `is_ours` the writer decides."""

    endings: tuple[str, ...]
    what: str
    is_ours: Callable[[Path], bool] | None = None


def head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def records(what: str, *keys: str, **values: str) -> Kind:
    """JSON objects that have all of these keys, and these values."""

    def is_ours(path: Path) -> bool:
        if path.stat().st_size > LONGEST_JSON:
            return False
        found = read_json(path, "")
        same = isinstance(found, dict) and found.keys() >= {*keys, *values}
        return same and all(found[key] == value for key, value in values.items())

    return Kind((".json",), what, is_ours)


def _is_classifier(path: Path) -> bool:
    """By the header of a safetensors file: its length in 8 bytes, then JSON."""
    head = head_of(path)
    header = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])
    return "classifier" in header["__metadata__"]


EVALUATION = records("a record of evaluate_fid.py", "metrics", "comparable_to_papers", "samples")
TABLE_FORMAT = "repae-evaluation-table-1"
TABLE = records("a table of evaluate_fid.py", format=TABLE_FORMAT)
# the meta.json of cached latents has all of these keys but the seed
LATENT_STATS = records("a record of scripts/vae_stats.py", "vae_sha256", "mean", "std", "seed")
SAMPLING = records("a record of sample_ddp.py", "settings", "settings_sha256")
SUMMARY = records("a summary of the quickstart", "label_accuracy", "confusion_matrix")
BENCHMARK = records("a result of scripts/benchmark.py", format="repae-benchmark-1")
TRACE = Kind((".json",), "a trace of scripts/benchmark.py",
             lambda path: f'"program": "{PROGRAM}"'.encode() in head_of(path))  # fmt: skip
PICTURE = Kind((".png",), "a picture drawn by this program",
               lambda path: f"tEXtSoftware\0{PROGRAM}".encode() in head_of(path))  # fmt: skip
PAGE = Kind((".html", ".htm"), "a report of this program",
            lambda path: f'content="{GENERATOR}"'.encode() in head_of(path))  # fmt: skip
MARKDOWN = Kind((".md",), "a page of this program",
                lambda path: head_of(path).startswith(MARKDOWN_MARK.encode()))  # fmt: skip
CLASSIFIER = Kind((".safetensors",), "a network of scripts/train_classifier.py", _is_classifier)
SAMPLES = Kind((".npz",), "samples of sample_ddp.py")


def check_kind(flag: str, out: Path, kind: Kind) -> None:
    """`UserError` unless the name of `out` has an ending of this kind, and nothing stands there but
    a file of this kind that this program has written."""
    if out.suffix not in kind.endings:
        name = "" if out.suffix else "have a name and "
        raise UserError(f"{flag} {out} must {name}end in {' or '.join(kind.endings)}")
    if kind.is_ours is None or not os.path.isfile(out):
        return
    try:
        ours = kind.is_ours(out)
    except (UserError, OSError, ValueError, LookupError, TypeError, RecursionError):
        ours = False  # of another content, whatever that is
    if not ours:
        text = f"{flag} {out} exists and is not {kind.what}"
        raise UserError(f"{text}: choose another name, or delete it")
