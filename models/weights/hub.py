"""The Hugging Face hub: how users write the name of a repository, and where its files lie here."""

import re
from pathlib import Path

# the address of a repository's page, and the prefixes of huggingface_hub and timm
ADDRESS = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://|hf[-_]hub:)"
    r"([\w.-]+/[\w.-]+?)(?:/tree/main)?/?"
)


def repository(spec: str) -> str:
    """OWNER/NAME of the repository whose address is given; anything else as it is."""
    match = ADDRESS.fullmatch(spec.strip())
    return match[1] if match else spec


def snapshot_in(folder: Path) -> Path:
    """The files of a repository whose folder in the hub's cache (models--OWNER--NAME) is given, of
    its main branch or of the one revision that is there; any other folder as it is."""
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    main = folder / "refs" / "main"
    if len(snapshots) > 1 and main.is_file():
        revision = main.read_text(errors="replace").strip()
        snapshots = [path for path in snapshots if path.name == revision]
    return snapshots[0] if len(snapshots) == 1 else folder
