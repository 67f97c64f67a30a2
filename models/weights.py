"""Weight files: where one is published, where its copy lies here, how it is read and loaded.

For example:

    file = WeightFile("vgg16-397923af.pth", url="https://download.pytorch.org/models/vgg16-...")
    state = read_state(file.fetch())  # a copy found here, else a download
    load_strictly(net, state, file, "torchvision's VGG-16")
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.errors import UserError

# what `save_pretrained` of diffusers writes into a folder
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class WeightFile:
    """One weight file: as its publisher names it, where it comes from, and where a copy may lie.

    It comes from a Hugging Face repository (`repo`), or from a `url`, or it is a file that the user
    has named (`path`). Copies are looked for in the cache of huggingface_hub or of torch.hub.
    Creating one reads nothing. `str()` of it names it in a message.
    """

    # file name, as published
    name: str
    # Hugging Face repository, "owner/name"
    repo: str = ""
    # folders of the repository that may hold the file; the first one that does is taken
    subfolders: tuple[str, ...] = ("",)
    # files of the same folder without which it is of no use, e.g. its config.json: fetched with it
    companions: tuple[str, ...] = ()
    # address of the download, for a file that is in no Hugging Face repository
    url: str = ""
    # sha256 of the file, or its first digits; "" = not known
    sha256: str = ""
    # the user's own copy; if given, no other place is looked at
    path: Path | None = None
    # how a user names a copy of theirs, with {} for its path: "encoder.weights={}", "--weights {}"
    setting: str = "{}"
    # what a user can do without the file: "set loss.reg.lpips=0"; "" = nothing
    otherwise: str = ""

    def __str__(self) -> str:
        if self.path:
            return str(self.path)
        return f"{self._names()[0]} of {self.repo}" if self.repo else self.name

    def named(self, path: str | Path) -> "WeightFile":
        """The same file, but read from `path`, which the user has named."""
        return replace(self, path=Path(path))

    def find(self) -> Path | None:
        """The copy on this machine; None if there is none yet. Downloads nothing.

        Raises `UserError` if a file that the user has named does not exist.
        """
        if self.path:
            if not self.path.is_file():
                remedy = f"; {self.remedy}" if self.remedy else ""
                place = self.setting.format(self.path)
                raise UserError(f"{place}: no such file; expected {self.name}{remedy}")
            return self.path
        if not self.repo:
            return self._in_torch_cache() if self._in_torch_cache().is_file() else None
        for subfolder in self.subfolders:
            names = self._names(subfolder)
            copies = [huggingface_hub.try_to_load_from_cache(self.repo, name) for name in names]
            if all(isinstance(copy, str) for copy in copies):
                return Path(copies[0])
        return None

    def fetch(self, download: bool = True) -> Path:
        """The copy on this machine, downloaded into the cache first if there is none.

        With `download=False` nothing is downloaded. Raises `UserError`, naming the file, the places
        looked at, the reason and the remedy, if it cannot be had. A download whose hash is not
        `sha256` is refused and not kept; a copy found here is not hashed: see `check_sha256`.
        """
        found = self.find()
        if found:
            return found
        reason = "not downloaded, as that was not asked for"
        if download:
            try:
                return self._download()
            # the hub client's errors are OSErrors, but for a missing entry and an impossible name
            # (ValueError); RuntimeError: what torch.hub received has another hash
            except (OSError, ValueError, RuntimeError) as error:
                reason = short(error)
        raise UserError(f"{self} not found in {self._cache()} ({reason}); {self.remedy}")

    def check_sha256(self, path: Path, otherwise: str = "") -> str:
        """The sha256 of `path`, 64 hexadecimal digits; `UserError` if it is not `self.sha256`.

        `otherwise`: what a user can do who means another file, with {} for the sha256 found.
        """
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(self.sha256.lower()):
            other = f", or {otherwise.format(found)}" if otherwise else ""
            raise UserError(
                f"{path} has sha256 {found}, expected {self.sha256}: it is not the file of "
                f"{self.source}; fetch it again{other}"
            )
        return found

    @property
    def source(self) -> str:
        """Address that a download asks for; "" if the file is published nowhere."""
        if not self.repo:
            return self.url
        return huggingface_hub.hf_hub_url(self.repo, self._names()[0])

    @property
    def remedy(self) -> str:
        """What to do where the file cannot be downloaded; "" if nothing is known to help."""
        steps = [self.otherwise] if self.otherwise else []
        setting = self.setting.format("DIR" if self.companions else "FILE")
        if self.repo:
            # where several folders are possible, only the whole repository is sure to have it
            files = [*self._names(), ""] if len(self.subfolders) == 1 else [""]
            command = f"hf download {self.repo} {' '.join(files)}--local-dir DIR"
            steps.insert(0, f"run `{command}` where there is a network, then give {setting}")
        elif self.url:
            steps.insert(0, f"fetch {self.url} where there is a network, then give {setting}")
        return ", or ".join(steps)

    def _names(self, subfolder: str | None = None) -> list[str]:
        """Paths in the repository: of the file, then of its companions."""
        folder = self.subfolders[0] if subfolder is None else subfolder
        return [f"{folder}/{name}".lstrip("/") for name in (self.name, *self.companions)]

    def _in_torch_cache(self) -> Path:
        return Path(torch.hub.get_dir()) / "checkpoints" / self.name

    def _cache(self) -> Path | str:
        if not self.repo:
            return self._in_torch_cache()
        return constants.HF_HUB_CACHE

    def _download(self) -> Path:
        if not self.repo:
            path = self._in_torch_cache()
            path.parent.mkdir(parents=True, exist_ok=True)
            # writes elsewhere first, then renames
            torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.sha256 or None)
            return path
        for subfolder in self.subfolders:
            names = self._names(subfolder)
            try:
                copies = [huggingface_hub.hf_hub_download(self.repo, name) for name in names]
                return Path(copies[0])
            except RemoteEntryNotFoundError as error:
                absent = error
        raise absent


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors or a .pt / .ckpt / .pth file, on the CPU; runs no pickled code.

    The tensors may stand bare in the file, or under "state_dict" or "model". Raises `UserError` for
    a file that is damaged, absent, or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes the unpickler raise anything
        raise UserError(
            f"{path} is not a file of plain tensors, and nothing else is ever unpickled "
            f"({short(error)}); for a training checkpoint of the official code run "
            "scripts/import_official.py"
        ) from error
    content = content if isinstance(content, dict) else {}
    state = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f'{path} is neither a state dict nor a dict with one under "state_dict"')
    return state


def read_config(path: Path) -> dict:
    """The config.json that lies beside a network's weights; `UserError` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({short(error)}): copy or download its folder again"
        ) from error


def load_strictly(net: nn.Module, state: Mapping[str, Tensor], origin, what: str) -> None:
    """Copy `state` into `net`; `UserError` unless it has exactly the network's tensors and shapes.

    A network on the meta device takes the tensors themselves, cast to its own dtypes, in place of a
    copy. `origin` and `what` name the weights and the network in the message.
    """
    expected = net.state_dict()
    require_match(expected, state, origin, what)
    on_meta = any(value.is_meta for value in expected.values())
    if on_meta:
        state = {name: value.to(expected[name].dtype) for name, value in state.items()}
    net.load_state_dict(state, strict=True, assign=on_meta)


def require_match(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], origin, what: str):
    """`UserError` unless both have the same keys and shapes; lists the first three of each kind."""
    wrong = [k for k in expected if k in state and expected[k].shape != state[k].shape]
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(expected[k].shape)}" for k in wrong]
    kinds = {
        "missing": [k for k in expected if k not in state],
        "unexpected": [k for k in state if k not in expected],
        "of another shape": shapes,
    }
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    ]
    if found:
        raise UserError(f"weights of {origin} do not fit {what}: tensors {'; '.join(found)}")


def short(error: Exception, length: int = 400) -> str:
    """An error as one line of at most about `length` characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:length]}{' ...' if len(text) > length else ''}"
