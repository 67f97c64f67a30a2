"""Weight files: where one is published, where its copy lies here, how it is read and loaded.

For example:

    file = WeightFile("vgg16-397923af.pth", url="https://download.pytorch.org/models/vgg16-...")
    state = read_state(file.fetch())  # a copy found here, else a download
    load_strictly(net, state, file, "torchvision's VGG-16")
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.errors import (
    PICKLES,
    SAFETENSORS,
    Range,
    RecordError,
    UserError,
    convert,
    read_json,
    what_is,
)

# what `save_pretrained` of diffusers writes into a folder
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# types in which weights are stored that are floats here
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# no number of a network's config is outside; numbers of layers are smaller
SIZES = Range(at_least=0, at_most=2**20)
LONGEST = 32  # list in such a config, but for statistics of channels
LAYERS = ("depth", "layers_per_block", "num_res_blocks")


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
                copies = [huggingface_hub.try_to_load_from_cache(self.repo, n) for n in names]
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
        absent = None
        for subfolder in self.subfolders:
            names = self._names(subfolder)
            try:
                copies = [huggingface_hub.hf_hub_download(self.repo, name) for name in names]
                return Path(copies[0])
            except LocalEntryNotFoundError:  # no network, which says nothing about the hub
                raise
            except EntryNotFoundError as error:
                absent = error
        assert absent is not None, self.subfolders
        raise absent


def read_plain(path: Path) -> Any:
    """What a file holds of tensors and plain values, on the CPU: a .safetensors, or a .pt / .pth /
    .ckpt of PyTorch, told apart by their content. Runs no pickled code.

    Raises `UserError`, which says what the file is, for one that is absent, damaged or another.
    """
    kind = what_is(path)
    try:
        if kind == SAFETENSORS:
            return load_file(path)
        if os.path.isfile(path):
            with path.open("rb") as file:  # given a path, torch goes by the end of its name
                return torch.load(file, map_location="cpu", weights_only=True)
        reason = ""
    except Exception as error:  # a damaged or hostile file makes the unpickler raise anything
        reason = f" ({short(error)})"
    if kind == "absent":
        raise UserError(f"{path}: no such file; correct the path, or copy the file there")
    remedy = "name another file, or copy it again"
    if kind in PICKLES:
        remedy = "for a training checkpoint of the official code run scripts/import_official.py"
    raise UserError(
        f"{path} is not a file of plain tensors, and nothing else is ever unpickled: it is "
        f"{kind}{reason}; {remedy}"
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a weight file, see `read_plain`. The tensors may stand bare in the file, or
    under "state_dict" or "model"; `UserError` for anything else."""
    content = read_plain(path)
    content = content if isinstance(content, dict) else {}
    state = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not isinstance(state, dict) or not state or not all(map(is_plain, state.values())):
        raise UserError(
            f'{path} is neither a state dict nor a dict with one under "state_dict": it holds '
            f"{_first([*map(str, content)], 8) or 'no named tensors'}"
        )
    return {str(name): value for name, value in state.items()}


def is_plain(value: object) -> bool:
    """Whether this is a tensor with a stored number for each element: not sparse, not quantized,
    not on the meta device. A few bytes can describe a tensor of any size, which would fill the
    memory once copied."""
    if not isinstance(value, Tensor):
        return False
    dense = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return dense and value.untyped_storage().nbytes() >= value.nbytes


def read_config(path: Path) -> dict:
    """The config.json that lies beside a network's weights; `UserError` if it cannot be read."""
    remedy = "copy or download its folder again"
    try:
        config = read_json(path, remedy)
    except UserError as error:
        raise UserError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, expected an object; {remedy}")
    return config


def arguments_for(network: type, config: Mapping, origin) -> dict[str, Any]:
    """The entries of a config.json that the class `network` takes, each as its `__init__` declares
    it, every number in `SIZES`; `UserError` naming `origin` for one that is not."""
    hints = get_type_hints(network.__init__)
    taken = {name: value for name, value in config.items() if name in hints and name != "return"}
    taken = {n: list(v) if isinstance(v, tuple) else v for n, v in taken.items()}
    try:
        found = {name: _argument(name, value, hints[name]) for name, value in taken.items()}
    except RecordError as error:
        raise UserError(f"config of {origin}: {error}") from None
    declared = signature(network.__init__).parameters
    # diffusers 0.35 declares tuples where it adds to a list, as its defaults are
    wants_list = {name for name in found if isinstance(declared[name].default, list)}
    wants_list -= {name for name, value in found.items() if value is None}
    return {name: list(v) if name in wants_list else v for name, v in found.items()}


def _argument(name: str, value: Any, kind: Any) -> Any:
    if value is None and name.startswith(("latents_", "scaling_", "shift_")):
        return None  # none, also where the class has one of its own
    if isinstance(value, list) and len(value) > LONGEST and not name.startswith("latents_"):
        raise RecordError(f"{name} is a list of {len(value)}, expected at most {LONGEST}")
    allowed = Range(at_least=1, at_most=256) if name in LAYERS else SIZES
    # statistics and the shift of latents are the only numbers that may be negative
    signed = name.startswith(("latents_", "shift_"))
    return convert(value, kind, name, Range() if signed else allowed)


def load_strictly(net: nn.Module, state: Mapping[str, Tensor], origin, what: str) -> None:
    """Copy `state` into `net`; `UserError` unless it has exactly the network's tensors and shapes,
    and finite numbers.

    A network on the meta device takes the tensors themselves, cast to its own dtypes, in place of a
    copy. `origin` and `what` name the weights and the network in the message.
    """
    expected = net.state_dict()
    require_match(expected, state, origin, what)
    require_finite(state, origin)
    on_meta = any(value.is_meta for value in expected.values())
    if on_meta:
        state = {name: value.to(expected[name].dtype) for name, value in state.items()}
    net.load_state_dict(state, strict=True, assign=on_meta)


def require_match(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], origin, what: str):
    """`UserError` unless both have the same keys, shapes and kinds of numbers: a float is no whole
    number, and eight bits make no float. Lists the first three of each kind of fault."""
    both = [k for k in expected if k in state]
    wrong = [k for k in both if expected[k].shape != state[k].shape]
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(expected[k].shape)}" for k in wrong]
    other = [k for k in both if not _same_numbers(expected[k].dtype, state[k].dtype)]
    kinds = {
        "missing": [k for k in expected if k not in state],
        "unexpected": [k for k in state if k not in expected],
        "of another shape": shapes,
        "of another type": [f"{k} {state[k].dtype} for {expected[k].dtype}" for k in other],
    }
    found = [f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds.items() if keys]
    if found:
        raise UserError(f"weights of {origin} do not fit {what}: tensors {'; '.join(found)}")


def _first(keys: list[str], count: int = 3, length: int = 100) -> str:
    """The first names of a list, each cut."""
    shown = [key if len(key) <= length else f"{key[:length]}..." for key in keys[:count]]
    return ", ".join(shown + ["..."] * (len(keys) > count))


def _same_numbers(expected: torch.dtype, found: torch.dtype) -> bool:
    if expected.is_floating_point:
        return found in FLOATS
    broader = found.is_floating_point or found.is_complex or found == torch.bool
    return found == expected or not broader


def require_finite(state: Mapping[str, Tensor], origin) -> None:
    """`UserError` that names the first tensor with NaN or infinity, also once it is float32."""
    for name, value in state.items():
        # one pass without a copy; NaN goes through a minimum, too
        if value.dtype in FLOATS and value.numel():
            smallest, largest = (side.float() for side in value.aminmax())
            if not (smallest.isfinite() and largest.isfinite()):
                raise UserError(
                    f"weights of {origin}: tensor {name} holds NaN or infinity; take another file"
                )


def count(net: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in net.parameters())


def short(error: Exception, length: int = 400) -> str:
    """An error as one line of at most about `length` characters; of torch's refusals to unpickle
    what was found, without the advice to load the file all the same."""
    text = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2]
    text = text.partition(" Check the documentation of torch.load")[0].partition(" Please use ")[0]
    return f"{type(error).__name__}: {text[:length]}{' ...' if len(text) > length else ''}"
