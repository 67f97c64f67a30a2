"""Weight files as others write them, and files that are made to do harm."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any


def message(caught) -> str:
    """The text of a UserError: one line."""
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900
    return text


class Bomb:
    """Unpickling it makes a folder, `mark`."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def archive(path: Path, pickled: bytes, numbers: bytes = bytes(40), **options) -> Path:
    """A zip archive as PyTorch writes it, with this pickle and one storage "0"."""
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in (("data.pkl", pickled), ("version", b"3"), ("data/0", numbers)):
            file.writestr(f"archive/{name}", content)
    return path


def rewritten(path: Path, edit, **options) -> Path:
    """A copy of a zip archive with other contents: `edit`(name, bytes) => bytes, None leaves it."""
    copy = path.with_stem(f"{path.stem}-copy")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", **options) as new:
        for name in old.namelist():
            if (content := edit(name, old.read(name))) is not None:
                new.writestr(name, content)
    return copy


def tensor(
    size: Any = (10,), stride=(1,), offset=0, numel: Any = 10, storage="FloatStorage", key="0"
) -> bytes:
    """The pickle of a tensor in `archive`, whatever is claimed of it."""

    def put(value) -> bytes:
        return pickle.dumps(value, 1)[:-1]

    kind = b"ctorch\n" + storage.encode() + b"\n"
    held = b"(" + put("storage") + kind + put(key) + put("cpu") + put(numel) + b"tQ"
    args = held + put(offset) + put(size) + put(stride) + b"\x89Nt"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + args + b"R."
