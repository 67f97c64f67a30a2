"""Weight files as they are published: where one comes from, and where its copy lies here.

For example:

    file = WeightFile("vgg16-397923af.pth", url="https://download.pytorch.org/models/vgg16-...")
    state = read_state(file.fetch())  # a copy found here, else a download
    load_strictly(net, state, file, "torchvision's VGG-16")
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from models.checks.errors import UserError, short
from models.checks.file_kinds import what_is


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
    # branch, tag or commit of the repository; None = its main branch
    revision: str | None = None
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

        Raises `UserError` if what the user has named does not exist, or is no file.
        """
        if self.path:
            if not os.path.isfile(self.path):
                kind, place = what_is(self.path), self.setting.format(self.path)
                remedy = f"; {self.remedy}" if self.remedy else ""
                why = "no such file" if kind == "absent" else f"this is {kind}, not a weight file"
                raise UserError(f"{place}: {why}; expected {self.name}{remedy}")
            return self.path
        if not self.repo:
            return self._in_torch_cache() if self._in_torch_cache().is_file() else None
        for subfolder in self.subfolders:
            names = self._names(subfolder)
            try:
                find, at = huggingface_hub.try_to_load_from_cache, self._at()
                copies = [find(self.repo, name, **at) for name in names]
            except ValueError as error:
                raise UserError(f"{self.repo} names no repository: {short(error)}") from None
            first, *others = copies
            if isinstance(first, str) and all(isinstance(copy, str) for copy in others):
                return Path(first)
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
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
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
        return huggingface_hub.hf_hub_url(self.repo, self._names()[0], **self._at())

    @property
    def remedy(self) -> str:
        """What to do where the file cannot be downloaded; "" if nothing is known to help."""
        steps = [self.otherwise] if self.otherwise else []
        setting = self.setting.format("DIR" if self.companions else "FILE")
        if self.repo:
            # where several folders are possible, only the whole repository is sure to have it
            files = [*self._names(), ""] if len(self.subfolders) == 1 else [""]
            at = f"--revision {self.revision} " if self.revision else ""
            command = f"hf download {self.repo} {' '.join(files)}{at}--local-dir DIR"
            steps.insert(0, f"run `{command}` where there is a network, then give {setting}")
        elif self.url:
            steps.insert(0, f"fetch {self.url} where there is a network, then give {setting}")
        return ", or ".join(steps)

    def _names(self, subfolder: str | None = None) -> list[str]:
        """Paths in the repository: of the file, then of its companions."""
        folder = self.subfolders[0] if subfolder is None else subfolder
        return [f"{folder}/{name}".lstrip("/") for name in (self.name, *self.companions)]

    def _at(self) -> dict[str, Any]:
        return {"revision": self.revision} if self.revision else {}

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
        absent = None
        for subfolder in self.subfolders:
            names = self._names(subfolder)
            try:
                get, at = huggingface_hub.hf_hub_download, self._at()
                copies = [get(self.repo, name, **at) for name in names]
                return Path(copies[0])
            except LocalEntryNotFoundError:  # no network, which says nothing about the hub
                raise
            except EntryNotFoundError as error:
                absent = error
        assert absent is not None, self.subfolders
        raise absent
