"""Dicts of numbers and NumPy arrays out of a pickle, without executing anything.

`models.weights.pickles` reads a pickle as data, in which a call is noted, not made. Of the calls,
those by which NumPy writes an array (protocols 2 to 5, NumPy 1 and 2) are understood afterwards;
any other one is a `UserError` that names it.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from models.checks.errors import UserError
from models.weights.objects import OBJECTS, Placeholder
from models.weights.pickles import read_pickle as read_as_data
from utils.evaluation.images.npz_images import readable

# functions that NumPy's pickles call, by their names in its versions
NUMPY_CALLS = {f"numpy.{core}.{rest}" for core in ("core", "_core")
               for rest in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
               }  # fmt: skip
# a type of numbers in NumPy's letters; not objects, texts or structures
NUMBERS = re.compile(r"[?bBiufc]\d{0,2}")
DEEPEST = 4  # dicts in dicts


class _Type(Placeholder):
    """A type of numbers: its letters, and the order of its bytes."""

    def __init__(self, letters: Any, *_: Any):
        super().__init__("numpy.dtype")
        self.letters, self.order = letters, "="

    def set_state(self, state: Any) -> None:
        self.order = state[1]


def read_pickle(path: Path) -> Any:
    """The dicts, lists, numbers, texts and arrays of numbers in a pickle; `UserError` if it is
    damaged or holds anything else."""

    def refuse(_: Any) -> Any:
        raise ValueError("it refers to what is outside of it")

    with readable(path), open(path, "rb") as file:
        table = {"_codecs.encode": OBJECTS["_codecs.encode"], "numpy.dtype": _Type}
        return _with_arrays(path, read_as_data(file, table, refuse))


def _with_arrays(path: Path, value: Any, depth: int = 0) -> Any:
    """A copy in which the calls of NumPy are arrays. A dict may hold itself, hence the depth, which
    no file of statistics has."""
    if depth > DEEPEST:
        raise ValueError("dicts in dicts in dicts")
    if isinstance(value, dict):
        return {key: _with_arrays(path, inner, depth + 1) for key, inner in value.items()}
    if not isinstance(value, Placeholder):
        return value
    if value.name not in NUMPY_CALLS:
        raise UserError(f"{path} is a pickle that calls {value.name[:80]!r}: expected numbers and "
                        "NumPy arrays alone; nothing of it was executed")  # fmt: skip
    return _array(path, value)


def _array(path: Path, call: Placeholder) -> np.ndarray:
    """What `_reconstruct` with its state, `_frombuffer` or `scalar` would make."""
    if call.name.endswith("_reconstruct"):
        _, shape, dtype, fortran, data = call.content
        order = "F" if fortran else "C"
    elif call.name.endswith("scalar"):
        (dtype, data), shape, order = call.content, (), "C"
    else:
        data, dtype, shape, order = call.content
    numbers = _dtype(path, dtype)  # before the data, which may be a list of objects
    data = data.encode("latin-1") if isinstance(data, str) else data  # a text of Python 2
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array without its bytes")
    return np.frombuffer(data, numbers).reshape(shape, order=order)


def _dtype(path: Path, dtype: _Type) -> np.dtype:
    if not NUMBERS.fullmatch(dtype.letters):
        objects = dtype.letters.startswith("O")
        kind = "Python objects" if objects else f"the type {dtype.letters[:20]!r}"
        raise UserError(f"{path} holds an array of {kind}, expected numbers; nothing of it was "
                        "executed")  # fmt: skip
    order: Any = dtype.order
    return np.dtype(dtype.letters).newbyteorder(order)
