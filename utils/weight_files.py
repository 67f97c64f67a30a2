"""The published weight files of the feature networks: name, source, and sha256.

A file is checked before anything in it is unpickled, and never fetched unless asked for.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from models.errors import UserError
from utils.checkpoint import sha256_file


@dataclass(frozen=True)
class WeightFile:
    """A published file: what it is called, where it lies, and what its bytes hash to."""

    name: str
    url: str
    sha256: str


PUBLISHED = {
    "inception": WeightFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "dinov2": WeightFile(
        "dinov2_vitl14_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
}


def default_weights(family: str) -> Path:
    """Where a published weight file is looked for when none is named: torch's hub cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / PUBLISHED[family].name


def find_weights(
    family: str, path: str | None = None, sha256: str | None = None, download: bool = False
) -> tuple[Path, str]:
    """The checked weight file of `inception` or `dinov2` => (path, its sha256).

    `path` None: the hub cache, fetched there if `download`. `sha256` None: the published one;
    another value is the user's word that these other weights are wanted.
    """
    published = PUBLISHED[family]
    file = Path(path) if path else default_weights(family)
    if not file.is_file() and download and path is None:
        _download(published, file)
    if not file.is_file():
        raise UserError(
            f"--features {family} needs {published.name}, not found at {file}: fetch "
            f"{published.url} (sha256 {published.sha256}) to there, name it by --weights FILE, "
            f"or add --download"
        )
    found, wanted = sha256_file(file), (sha256 or published.sha256).lower()
    if found != wanted:
        raise UserError(
            f"{file} has sha256 {found}, expected {wanted}: not the file of {published.url}; "
            f"fetch it again, or if other weights are meant, add --weights-sha256 {found}"
        )
    return file, found


def _download(published: WeightFile, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(published.url, str(file))
    except OSError as error:
        raise UserError(
            f"cannot download {published.url} ({error}): fetch it elsewhere and copy it to {file}"
        ) from None
