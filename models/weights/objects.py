"""What stands for the objects of a pickle: plain values where simple, a placeholder elsewhere."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

SCALARS = (str, int, float, bool, bytes, type(None))
LONGEST_KEY = 16  # items of a tuple


class Damaged(ValueError):
    """A weight file that is damaged, or made to do harm; the message says what is wrong in it."""


class Placeholder:
    """What a pickle names and this project does not build: a class, a function or an object.

    name: "module.Name". content: None of a class or function; of an object its arguments or its
    state, of a container its list, dict or set. Inert: nothing of that name is looked for.
    """

    __slots__ = ("content", "name")

    def __init__(self, name: str, content: Any = None):
        self.name, self.content = name, content

    def __repr__(self) -> str:
        return f"<{self.name[:100]}>"

    def set_state(self, state: Any) -> None:
        if isinstance(self.content, dict) and isinstance(state, dict):
            self.content.update(state)  # an object derived from dict
        else:
            self.content = state


class Attributes(dict):
    """The attributes of an object of which nothing else matters: argparse's Namespace, a module of
    TorchScript."""

    def set_state(self, state: Any) -> None:
        state = state[0] if isinstance(state, tuple) and state else state
        self.update(state if isinstance(state, dict) else {})


class OmegaDict(Attributes):
    """A DictConfig of OmegaConf, as the dict that it stands for."""

    def set_state(self, state: Any) -> None:
        content = state.get("_content") if isinstance(state, dict) else None
        if isinstance(content, dict):
            self.update({name: _value(node) for name, node in content.items()})


class OmegaList(list):
    """A ListConfig of OmegaConf, as the list that it stands for."""

    def set_state(self, state: Any) -> None:
        content = state.get("_content") if isinstance(state, dict) else None
        self.extend([*map(_value, content if isinstance(content, list) else [])])


def _value(node: Any) -> Any:
    """The value in a node of OmegaConf."""
    state = node.content if isinstance(node, Placeholder) else None
    return state["_val"] if isinstance(state, dict) and "_val" in state else node


def key_of(value: Any) -> Any:
    """A key for a dict or set; a placeholder for what takes long to hash. Nested tuples are no
    keys: hashing deep ones ends the process."""
    flat = isinstance(value, tuple) and len(value) <= LONGEST_KEY
    parts = value if flat else (value,)
    if all(isinstance(part, SCALARS) and not _is_huge(part) for part in parts):
        return value
    return value if isinstance(value, Placeholder) else Placeholder("key", value)


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 64


def paired(pairs: Iterable[Sequence[Any]]) -> dict:
    """[(key, value), ...] => dict."""
    return {key_of(key): value for key, value in pairs}


def first(value: Any, *_: Any) -> Any:
    return value


# The functions below go through lists of a pickle, never through a tensor: that would make one
# object of each of its numbers.


def _ordered(pairs: Any = ()) -> dict:
    pairs = [*pairs.items()] if isinstance(pairs, dict) else _listed(pairs)
    return paired(_listed(pair) for pair in pairs)


def _set(items: Any = ()) -> set:
    return set(map(key_of, _listed(items)))


def _listed(items: Any) -> list | tuple:
    if not isinstance(items, list | tuple):
        raise Damaged(f"its pickle uses a {type(items).__name__} as a list")
    return items


# name of a class or function in a pickle => what makes its object of its arguments
OBJECTS: dict[str, Callable] = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *_: {},
    "argparse.Namespace": lambda *_: Attributes(),
    "types.SimpleNamespace": lambda *_: Attributes(),
    "omegaconf.dictconfig.DictConfig": lambda *_: OmegaDict(),
    "omegaconf.listconfig.ListConfig": lambda *_: OmegaList(),
    # bytes and sets in protocol 2
    "_codecs.encode": lambda text, *_: text.encode("latin-1"),
    "__builtin__.set": _set,
    "builtins.set": _set,
    "torch.Size": first,
    "torch.device": first,
    **{f"torch.jit._pickle.{name}": first for name in (
        "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist",
        "restore_type_tag")},
}  # fmt: skip
