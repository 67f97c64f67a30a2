"""Which published weight file a run will read, and where its copy lies. Nothing is loaded here."""

from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache


class Wanted(NamedTuple):
    """A weight file that will be read: `what` as its publisher names it, or its path here."""

    what: str
    path: Path | None  # the copy on this machine; None = it has to be downloaded
    url: str = ""  # of the download
    remedy: str = ""  # how to do without it


def cached_file(repo: str, file: str) -> Path | None:
    """The copy of a hub file in the hub's cache."""
    copy = try_to_load_from_cache(repo, file)
    return Path(copy) if isinstance(copy, str) else None


def torch_hub_file(url: str) -> Path:
    """Where torch's hub cache keeps the file of `url`, whether it is there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
