"""The state dict of one network in whatever a file holds: in nested dicts, under prefixes."""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.checks.errors import UserError, printable
from models.weights.loading import first_names
from models.weights.objects import Placeholder
from models.weights.tensors import NoNumbers, is_plain

# keys of the network sought: alternatives, each one key or keys that must all be there
Known = Sequence[str | tuple[str, ...]]
# what torch.compile, FSDP and activation checkpointing put before a name, also inside of one
WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
DEEPEST, LONGEST_NAME = 32, 500  # nested dicts; characters of the name of a tensor
MOST_PLACES = 100


class NotFound(UserError):
    """The network that is sought is not in the file."""


@dataclass
class Found:
    """A state dict, and where it was: "ema, without the prefix module."; "" = the whole file."""

    state: dict[str, Tensor]
    where: str = ""


@dataclass
class _Entry:
    """A tensor of a file: the dicts that it is in ("state_dict."), its name in them, and both in
    one, without wrappers. `twice`: another tensor has the same."""

    inside: str
    name: str
    value: Tensor | NoNumbers
    full: str = ""
    twice: bool = False

    def __post_init__(self):
        self.full = WRAPPERS.sub("", self.inside + self.name)
        self.wrappers = set(WRAPPERS.findall(self.inside + self.name))
        self.inside = WRAPPERS.sub("", self.inside)


def find_state(
    content: Any, known: Known, origin, prefer: Sequence[str] = (), what: str = "the network"
) -> Found:
    """The tensors of the network that has the keys `known`, named as there.

    content: what `read_plain` gives. known: () = the file is a state dict, or has one under
    "state_dict" or "model". prefer: names of dicts or prefixes; of several places, that with the
    first of them is taken ("ema", "model"). Tensors beside the network are left out. Raises
    `NotFound`, naming `origin` and `what`, where no place has the keys, `UserError` where several
    have and differ.
    """
    if not known:
        return _whole(content, origin)
    entries = _entries(content)
    places = _places(entries, known)
    if not places:
        each = [keys if isinstance(keys, str) else " and ".join(keys[:3]) for keys in known[:3]]
        raise NotFound(
            f"weights of {origin} do not fit {what}: it has no tensors {', or '.join(each)}, but "
            f"{_holds(content, entries)}; name another file"
        )
    ranks = {place: _rank(place, prefer) for place in places}
    best = [place for place in places if ranks[place] == min(ranks.values())]
    found = _take(entries, best[0], places, origin)
    for other in best[1:]:
        if not _equal(found.state, _take(entries, other, places, origin).state):
            names = " and in ".join(place[:60].removesuffix(".") or "itself" for place in (
                best[0], other))  # fmt: skip
            raise UserError(
                f"{origin} holds several such networks, in {names}, and they differ: save the one "
                "that is meant in a file of its own"
            )
    return found


def tensor_names(content: Any) -> list[str]:
    """Dotted names of all tensors in what `read_plain` gives, without wrappers."""
    return [*_entries(content)]


def _entries(content: Any) -> dict[str, _Entry]:
    """All tensors in nested dicts, and in modules that were pickled whole, by their full names."""
    entries: dict[str, _Entry] = {}
    for inside, name, value in each_tensor(content):
        entry = _Entry(inside, name, value)
        other = entries.setdefault(entry.full, entry)
        other.twice |= other.value is not value
    return entries


def each_tensor(content: Any) -> Iterator[tuple[str, str, Tensor | NoNumbers]]:
    """(dicts that it is in, name below them, tensor) for all tensors in what `read_plain` gives.
    Nothing is gone through twice, however often it is referred to."""
    waiting, seen = deque([("", content, 0)]), set()
    while waiting:
        inside, holder, depth = waiting.popleft()
        if id(holder) in seen or depth > DEEPEST:
            continue
        seen.add(id(holder))
        for key, value in _items(holder):
            name = str(key)[:LONGEST_NAME] if isinstance(key, str | int) else ""
            if not name:
                continue
            if isinstance(value, Tensor | NoNumbers):
                yield inside, name, value
            elif isinstance(value, dict | Placeholder) and len(inside) < LONGEST_NAME:
                waiting.append((f"{inside}{name}.", value, depth + 1))


def _items(holder: Any) -> list[tuple[Any, Any]]:
    """What a dict holds, or an object, or a module of PyTorch that was pickled whole."""
    state = holder.content if isinstance(holder, Placeholder) else holder
    if not isinstance(state, dict):
        return []
    if not {"_parameters", "_buffers", "_modules"} <= state.keys():
        return [*state.items()]
    not_saved = state.get("_non_persistent_buffers_set")
    not_saved = not_saved if isinstance(not_saved, set) else set()
    parts = [state[part] for part in ("_parameters", "_buffers", "_modules")]
    items = [item for part in parts if isinstance(part, dict) for item in part.items()]
    return [(name, value) for name, value in items if name not in not_saved]


def _places(entries: dict[str, _Entry], known: Known) -> dict[str, bool]:
    """What stands before the known keys ("ema.module.") => whether one dict has all of them."""
    places = {}
    for keys in known:
        keys = (keys,) if isinstance(keys, str) else keys
        for full in entries:
            before = full.removesuffix(keys[0])
            if not full.endswith(keys[0]) or (before and not before.endswith(".")):
                continue
            if all(before + key in entries for key in keys):
                inside = {entries[before + key].inside for key in keys}
                alone = len(inside) == 1 and before.startswith(inside.pop())
                places[before] = places.get(before, True) and alone
    return dict([*places.items()][:MOST_PLACES])


def _rank(place: str, prefer: Sequence[str]) -> int:
    parts = place.split(".")
    return next((i for i, name in enumerate(prefer) if name in parts), len(prefer))


def _take(entries: dict[str, _Entry], place: str, places: dict[str, bool], origin) -> Found:
    """The tensors of a place, without those of other places below it."""
    others = tuple(other for other in places if other != place and other.startswith(place))
    below = [e for e in entries.values() if e.full.startswith(place)]
    below = [e for e in below if not (others and e.full.startswith(others))]
    dicts = [e.inside for e in below if place.startswith(e.inside)]
    inside = max(dicts, key=len) if dicts else place
    if places[place]:
        below = [e for e in below if e.inside == inside]
    for entry in below:
        if not is_plain(entry.value):
            raise UserError(f"{origin}: tensor {entry.full[:100]} is not stored number by number "
                            f"({entry.value!r:.60}); save it as a dense one")  # fmt: skip
        if entry.twice:
            raise UserError(f"{origin} has two tensors for {entry.full[:100]}; name another file")
    words = [inside[:-1]] if inside else []
    wrappers = sorted(set().union(*(e.wrappers for e in below)))
    if prefixes := [prefix for prefix in (place.removeprefix(inside), *wrappers) if prefix]:
        words.append(f"without the prefix {' and '.join(prefixes)}")
    state = {e.full.removeprefix(place): e.value for e in below if isinstance(e.value, Tensor)}
    return Found(state, printable(", ".join(words)))


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, of whatever type they are."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _holds(content: Any, entries: dict[str, _Entry]) -> str:
    if entries:
        return first_names([*entries], 8)
    keys = content if isinstance(content, dict) else ()
    names = [key if isinstance(key, str) else repr(key) for key in [*keys][:9]]
    kind = content.name[:100] if isinstance(content, Placeholder) else type(content).__name__
    kind = "dict" if isinstance(content, dict) else kind
    return first_names(names, 8) or f"no named tensors ({kind})"


def _whole(content: Any, origin) -> Found:
    """The state dict that a file is, or has under "state_dict" or "model"."""
    held = content if isinstance(content, dict) else {}
    where = next((key for key in ("state_dict", "model") if key in held), "")
    state = held[where] if where else held
    if not isinstance(state, dict) or not state or not all(map(is_plain, state.values())):
        raise UserError(
            f'{origin} is neither a state dict nor a dict with one under "state_dict": it holds '
            f"{_holds(content, {})}"
        )
    return Found({str(name): value for name, value in state.items()}, where)
