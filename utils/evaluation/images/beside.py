"""The record of sample_ddp.py beside a file of samples: NAME.json of NAME.npz.

A JSON file of that name may be anything. It counts only if it is a record whose hash fits its
settings, and which speaks of as many images as the file holds and, where it has their hash, of
these. Everything else is a note, and never an error.
"""

import hashlib
import json
import os
from pathlib import Path

from models.checks.errors import UserError
from models.checks.file_kinds import read_json
from utils.process.written import LONGEST_JSON, SAMPLING

CONTENT = "content_sha256"  # of the images, as `ImageSet.fingerprint` hashes them


def record_beside(spec, num: int | None = None) -> tuple[dict | None, str]:
    """The record beside a file of `num` samples (None = as many as the record says), and a note on
    what is there but is no such record; None and "" where nothing is."""
    named = isinstance(spec, str | Path) and Path(spec).name  # "." and "/" have no name
    path = Path(spec).with_suffix(".json") if named else None
    if path is None or not os.path.lexists(path):
        return None, ""
    try:
        return _read(path, num)
    except UserError as error:
        return None, str(error)


def _read(path: Path, num: int | None) -> tuple[dict | None, str]:
    if path.is_file() and path.stat().st_size > LONGEST_JSON:
        return None, f"{path} beside the samples is too large for a record of them: not used"
    record = read_json(path, "it is not used")
    settings = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(settings, dict) or record.get("settings_sha256") != hash_settings(settings):
        return None, f"{path} beside the samples is not {SAMPLING.what}: not used"
    said = settings.get("num_samples")
    if num is not None and said != num:
        return None, f"{path} is the record of {said} samples, and not of these {num}: not used"
    return record, ""


def check_content(record: dict | None, content: str, name: str) -> tuple[dict | None, str]:
    """The record if it is that of images with the fingerprint `content`, which older records do not
    say; else None and a note."""
    if record is None or record.get(CONTENT) in (None, content):
        return record, ""
    return None, f"the record beside {name} is that of other images: not used"


def hash_settings(settings: dict) -> str:
    """sha256 of the settings of samples, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
