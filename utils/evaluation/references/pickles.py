"""Dicts of numbers and NumPy arrays out of a pickle, without executing anything.

A pickle is a program for a stack machine. Its operations are listed by Python's `pickletools`; here
those that only put data together are followed, and a call is noted, not made. Of the calls, those
by which NumPy writes an array (protocols 2 to 5, NumPy 1 and 2) are understood afterwards; any
other one is a `UserError` that names it.
"""

import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.checks.errors import UserError
from utils.evaluation.images.npz_images import readable

# operations => the data that they push are their own argument, or these
ARGUMENT = re.compile(r"(SHORT_)?BIN(UNICODE8?|BYTES8?|STRING)|(BIN)?(INT[12]?|FLOAT)|LONG[14]?|"
                      r"UNICODE|STRING|BYTEARRAY8")  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
# how many items of the stack a tuple takes
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NOTHING = {"PROTO", "FRAME"}
# functions that NumPy's pickles call, by their names in its versions
NUMPY_CALLS = {f"numpy.{core}.{rest}" for core in ("core", "_core")
               for rest in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
               }  # fmt: skip
KNOWN_CALLS = {*NUMPY_CALLS, "numpy.ndarray", "numpy.dtype", "_codecs.encode"}
# a type of numbers in NumPy's letters; not objects, texts or structures
NUMBERS = re.compile(r"[?bBiufc]\d{0,2}")
DEEPEST = 4  # dicts in dicts


@dataclass
class Name:
    """A function or class that the pickle names, in full."""

    text: str


@dataclass
class Call:
    """A call that was not made: of what, with what, and the state that would be set afterwards."""

    name: str
    arguments: tuple
    state: Any = None


def read_pickle(path: Path) -> Any:
    """The dicts, lists, numbers, texts and arrays of numbers in a pickle; `UserError` if it is
    damaged or holds anything else."""
    with readable(path):
        with open(path, "rb") as file:
            content = _Machine(path).run(file)
        return _with_arrays(path, content)


class _Machine:
    """The stack, the memo, and the operations on them."""

    def __init__(self, path: Path):
        self.path, self.memo = path, {}
        self.stack: list = []
        self.below: list[list] = []  # stacks under the marks

    def run(self, file) -> Any:
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in EMPTY:
                self.stack.append(EMPTY[name]())
            elif name in TUPLES:
                self.stack.append(tuple(self.take(TUPLES[name])))
            elif ARGUMENT.fullmatch(name):
                self.stack.append(argument)
            elif name not in NOTHING:
                self.operate(name, argument)
        raise ValueError("it has no end")

    def take(self, count: int) -> list:
        """The last items of the stack, which are removed."""
        if count > len(self.stack):
            raise ValueError("its stack is empty")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def marked(self) -> list:
        """What lies above the last mark; the mark goes, too."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def operate(self, name: str, argument: Any) -> None:
        if name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            key = len(self.memo) if name == "MEMOIZE" else argument
            self.memo[key] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self.marked()
            make = {"TUPLE": tuple, "LIST": list, "DICT": _pairs}[name]
            self.stack.append(make(items))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.take(2) if name == "SETITEM" else self.marked()
            self.last(dict).update(_pairs(items))
        elif name in ("APPEND", "APPENDS"):
            items = self.take(1) if name == "APPEND" else self.marked()
            self.last(list).extend(items)
        else:
            self.call(name, argument)

    def last(self, kind: type) -> Any:
        """The last item, which must be of this kind."""
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"a {type(self.stack[-1]).__name__} where a {kind.__name__} belongs")
        return self.stack[-1]

    def call(self, name: str, argument: Any) -> None:
        """Note a name, a call, or the state of one."""
        if name == "GLOBAL":
            self.stack.append(self.known(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            self.stack.append(self.known(".".join(map(str, self.take(2)))))
        elif name == "REDUCE":
            function, arguments = self.take(2)
            if not (isinstance(function, Name) and isinstance(arguments, tuple)):
                raise ValueError("a call of what is no function")
            self.stack.append(Call(function.text, arguments))
        elif name == "BUILD":
            (state,) = self.take(1)
            self.last(Call).state = state
        else:
            raise UserError(f"{self.path} uses {name} of the language of pickles, which no file of "
                            "statistics needs; nothing of it was executed")  # fmt: skip

    def known(self, text: str) -> Name:
        if text not in KNOWN_CALLS:
            raise UserError(f"{self.path} is a pickle that calls {text[:80]!r}: expected numbers "
                            "and NumPy arrays alone; nothing of it was executed")  # fmt: skip
        return Name(text)


def _pairs(items: list) -> dict:
    return dict(zip(items[::2], items[1::2], strict=True))


def _with_arrays(path: Path, value: Any, depth: int = 0) -> Any:
    """A copy in which the calls of NumPy are arrays. A dict may hold itself, hence the depth, which
    no file of statistics has."""
    if depth > DEEPEST:
        raise ValueError("dicts in dicts in dicts")
    if isinstance(value, dict):
        return {key: _with_arrays(path, inner, depth + 1) for key, inner in value.items()}
    return _array(path, value) if isinstance(value, Call) else value


def _array(path: Path, call: Call) -> np.ndarray:
    """What `_reconstruct` with its state, `_frombuffer` or `scalar` would make."""
    if call.name.endswith("_reconstruct"):
        _, shape, dtype, fortran, data = call.state
        order = "F" if fortran else "C"
    elif call.name.endswith("scalar"):
        (dtype, data), shape, order = call.arguments, (), "C"
    else:
        data, dtype, shape, order = call.arguments
    numbers = _dtype(path, dtype)  # before the data, which may be a list of objects
    return np.frombuffer(_bytes(data), numbers).reshape(shape, order=order)


def _dtype(path: Path, call: Call) -> np.dtype:
    """A type of numbers; the state holds the order of its bytes."""
    letters, order = call.arguments[0], call.state[1] if call.state else "="
    if not NUMBERS.fullmatch(letters):
        kind = "Python objects" if letters.startswith("O") else f"the type {letters[:20]!r}"
        raise UserError(f"{path} holds an array of {kind}, expected numbers; nothing of it was "
                        "executed")  # fmt: skip
    return np.dtype(letters).newbyteorder(order)


def _bytes(data: Any) -> bytes | bytearray:
    """The bytes of an array. Python 2 has texts for them, and protocol 2 of Python 3 writes them as
    a text that is to be encoded."""
    if isinstance(data, Call) and data.name == "_codecs.encode":
        data = data.arguments[0]
    data = data.encode("latin-1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array without its bytes")
    return data
