"""Names of classes: WordNet ids made readable, and the label that a name or a number means."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from operator import index

from models.checks.errors import UserError

WORDNET_ID = re.compile(r"n\d{8}", re.ASCII)
NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
MOST_CLOSE = 3  # names that an error proposes


def readable_names(classes: Sequence[str]) -> list[str]:
    """WordNet ids like n02099601 as their names, all synonyms with commas between them ("tench,
    Tinca tinca"), from the tables that come with timm; other names as they are."""
    if not any(WORDNET_ID.fullmatch(name) for name in classes):
        return list(classes)
    return [_readable(name) for name in classes]


def _readable(name: str) -> str:
    try:
        return _wordnet().label_name_to_description(name) if WORDNET_ID.fullmatch(name) else name
    except KeyError:  # an id that WordNet does not have
        return name


@cache
def _wordnet():
    from timm.data.imagenet_info import ImageNetInfo  # takes seconds

    return ImageNetInfo()


def names_by_label(classes: Sequence[str]) -> dict[str, str] | None:
    """Readable names by their label in text, as in a model_index.json; None: none is known."""
    names = enumerate(readable_names(classes))
    return {str(label): name for label, name in names if name} or None


def short_name(name: str, label: int) -> str:
    """A title for images of a class: the first synonym of its readable name; "class 3" if that is
    empty, or a number."""
    first = name.split(",")[0].strip()
    return f"class {label}" if not first or first == str(label) else first


def label_of(given: int | str, names: Sequence[str]) -> int:
    """The label that a number or the name of a class means.

    names: of the classes, by label, as they are or as `readable_names` gives them; empty ones are
    not known. Case does not count, underscores are spaces, and every synonym is a name. A number in
    text is a label, unless a class has it as its name. Raises `UserError` for what is no class, or
    the name of several.
    """
    return label_among(given, names, readable_names(names))


def labels_of(given: Sequence[str], names: Sequence[str], known: Sequence[str]) -> tuple[int, ...]:
    """The labels that words mean, each one class or several with commas between them; names and
    `known` as in `label_among`. `UserError` also for a class that is named twice."""
    whole = {_plain(name) for name in (*names, *known)}
    parts = [[word] if _plain(word) in whole else word.split(",") for word in given]
    labels = [label_among(part.strip(), names, known) for some in parts for part in some]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"class {twice[0]} is named twice: name each class once")
    return tuple(labels)


def label_among(given: int | str, names: Sequence[str], known: Sequence[str]) -> int:
    """`label_of`, given the readable names `known` of the classes as well. There may be fewer
    `names` than `known`."""
    if not isinstance(given, str):
        return _checked(index(given), known)
    both = list(zip_longest(names[: len(known)], known, fillvalue=""))
    found = [i for i, called in enumerate(both) if _plain(given) in _synonyms(*called)]
    if len(found) > 1:  # e.g. the classes "cat" and "Cat"
        found = [i for i in found if given in both[i]] or found
    if len(found) > 1:
        places = ", ".join(f"{i} ({known[i]})" for i in found)
        raise UserError(f"{given!r} names several classes, {places}: give the number of one")
    if found:
        return found[0]
    if NUMBER.fullmatch(given.strip()):
        return _checked(int(given), known)
    raise UserError(f"no class {given!r}: {_advice(given, known)}")


def _checked(label: int, names: Sequence[str]) -> int:
    if not 0 <= label < len(names):
        raise UserError(f"no class {label}: the labels are {_range(names)}")
    return label


def _range(names: Sequence[str]) -> str:
    return f"0 to {len(names) - 1}" if len(names) > 1 else "0 alone"


def _advice(given: str, known: Sequence[str]) -> str:
    """What to write instead of a name that no class has."""
    if not any(known):
        return f"the names of the classes are not recorded: give a label, {_range(known)}"
    spelled = {plain: i for i, name in enumerate(known) for plain in _synonyms(name)}
    wanted = _plain(given)
    near = [name for name in spelled if wanted and f" {wanted} " in f" {name} "][:MOST_CLOSE]
    near = near or difflib.get_close_matches(wanted, spelled, MOST_CLOSE)
    numbers = f"a label, {_range(known)}"
    if not near:
        first = next(filter(None, known)).split(",")[0]
        return f"give the name of one, e.g. {first!r}, or {numbers}"
    words = " or ".join(f"{name!r} ({spelled[name]})" for name in near)
    return f"did you mean {words}? Give a name, or {numbers}"


def _synonyms(*names: str) -> list[str]:
    """What a class is called, made comparable: its names, and what stands between their commas."""
    words = [word for name in names for word in (*name.split(","), name)]
    return list(dict.fromkeys(filter(None, map(_plain, words))))


def _plain(text: str) -> str:
    """A name without what does not count when names are compared."""
    text = unicodedata.normalize("NFC", text).casefold()
    return re.sub(r"[\s_]+", " ", text).strip()
