"""The weight file of an encoder: a file, the one of a folder, or what is published."""

from pathlib import Path

from models.checks.errors import UserError
from models.checks.file_kinds import WEIGHT_ENDINGS, advice_on_shards, what_is
from models.weights.hub import snapshot_in
from models.weights.loading import first_names

# of a folder, the first one that is there: of transformers and timm, then of open_clip
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
ENDINGS = (*WEIGHT_ENDINGS, ".tar")


def weights_in(path: Path) -> Path:
    """`path`, or if it is a folder, the weight file in it; `UserError` if it holds none, or several
    of which none has a name of `NAMES`."""
    if not path.is_dir():
        return path
    path = snapshot_in(path)
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    files = sorted(file for file in path.iterdir() if file.suffix in ENDINGS and file.is_file())
    if len(files) == 1:
        return files[0]
    if advice := advice_on_shards(path):
        raise UserError(f"{path} is {advice}, and name that")
    found = first_names([file.name for file in files or sorted(path.iterdir())], 6) or "nothing"
    raise UserError(
        f"{path} is {what_is(path)} without {NAMES[0]}, {NAMES[2]} or one single other weight "
        f"file: it holds {found}; name the file"
    )
