"""Pickles read as data: nothing that a pickle names is looked up, imported or called.

`pickletools` splits a pickle into its operations, and a small stack machine carries them out that
knows containers, texts and numbers. Whatever else is asked for is a `Placeholder`, unless `build`,
a table of functions of ours, has its name.

Format: pickletools.py of CPython describes every operation.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

from models.weights.objects import Attributes, Damaged, OmegaList, Placeholder, key_of, paired

# Operations, and items that they copy; a checkpoint of 2,000 tensors and their moments has 300,000.
# Memory and time of a pickle are bounded by it: a few hundred bytes, a few microseconds each.
MOST = 3_000_000
COST_OF_OBJECT = 16  # of operations, as a tensor takes a KiB
# operations that carry their value
VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
          "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
          "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}  # fmt: skip
FRESH = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
# objects of protocols 0 and 1; tensors with attributes, whose own function comes first
RECONSTRUCT = ("copyreg._reconstructor", "copy_reg._reconstructor")
REBUILD_TYPE = ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type")


def read_pickle(file: IO[bytes], build: Mapping[str, Callable], load: Callable[[Any], Any]) -> Any:
    """The value of the pickle at which `file` stands; leaves `file` behind it.

    build: "module.Name" => a function of ours that makes the object of its arguments.
    load: what stands for a persistent id. A damaged pickle may raise any exception.
    """
    machine = _Machine(build, load)
    for operation, value, _ in pickletools.genops(file):
        name = operation.name
        machine.spend(1)
        if name in VALUES:
            machine.stack.append(value)
        elif name in FRESH:
            machine.stack.append(FRESH[name]())
        elif name in OPERATIONS:
            OPERATIONS[name](machine, value)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Damaged(f"its pickle has the operation {name}, which no weight file needs")
    return machine.stack.pop()


class _Machine:
    """The stack and the memo of a pickle; a method for each operation that changes them."""

    def __init__(self, build: Mapping[str, Callable], load: Callable[[Any], Any]):
        self.build, self.load = build, load
        self.stack: list = []
        self.below: list[list] = []  # stacks under each mark
        self.memo: dict[int, Any] = {}
        self.left = MOST

    def spend(self, operations: int) -> None:
        self.left -= operations
        if self.left < 0:
            raise Damaged(f"its pickle has more than {MOST:,} operations")

    # ------------------------------------------------------------ stack and memo

    def on_mark(self, _) -> None:
        self.below.append(self.stack)
        self.stack = []

    def to_mark(self) -> list:
        items, self.stack = self.stack, self.below.pop()
        return items

    def on_pop(self, _) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.to_mark()

    def on_pop_mark(self, _) -> None:
        self.to_mark()

    def on_dup(self, _) -> None:
        self.stack.append(self.stack[-1])

    def on_memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def on_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    on_binput = on_long_binput = on_put
    on_binget = on_long_binget = on_get

    # ------------------------------------------------------------ containers

    def on_tuple(self, _) -> None:
        items = self.to_mark()
        self.stack.append(tuple(items))

    def on_tuple1(self, _) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def on_tuple2(self, _) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def on_tuple3(self, _) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def on_list(self, _) -> None:
        items = self.to_mark()
        self.stack.append(items)

    def on_dict(self, _) -> None:
        items = self.to_mark()
        self.stack.append(_pairs(items))

    def on_frozenset(self, _) -> None:
        items = self.to_mark()
        self.stack.append(frozenset(map(key_of, items)))

    def on_append(self, _) -> None:
        item = self.stack.pop()
        self.container(list).append(item)

    def on_appends(self, _) -> None:
        items = self.to_mark()
        self.container(list).extend(items)

    def on_setitem(self, _) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.container(dict)[key_of(key)] = value

    def on_setitems(self, _) -> None:
        items = self.to_mark()
        self.container(dict).update(_pairs(items))

    def on_additems(self, _) -> None:
        items = self.to_mark()
        self.container(set).update(map(key_of, items))

    def container(self, kind: type) -> Any:
        """The list, dict or set on top; that inside of a placeholder, whose class may be derived
        from one."""
        top = self.stack[-1]
        if isinstance(top, Placeholder):
            if not isinstance(top.content, kind):
                top.content = kind()
            return top.content
        if not isinstance(top, kind):
            raise Damaged(f"its pickle uses a {type(top).__name__} as a {kind.__name__}")
        return top

    # ------------------------------------------------------------ names and objects

    def on_global(self, names: str) -> None:
        self.stack.append(Placeholder(".".join(names.split(" ", 1))))

    def on_stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)) or len(module + name) > 1000:
            raise Damaged("its pickle has a class without a name")
        self.stack.append(Placeholder(f"{module}.{name}"))

    def on_reduce(self, _) -> None:
        args, what = self.stack.pop(), self.stack.pop()
        self.stack.append(self.make(what, args))

    on_newobj = on_reduce

    def on_newobj_ex(self, _) -> None:
        words, args, what = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(Placeholder(_name(what), (args, words)))

    def make(self, what: Any, args: Any) -> Any:
        """The object of the class or function `what`."""
        name = _name(what)
        if name in RECONSTRUCT:
            name, args = _name(args[0]), ()
        if name in REBUILD_TYPE:
            name, args = _name(args[0]), args[2]
        if not isinstance(args, tuple):
            raise Damaged(f"its pickle makes {name[:100]} without arguments")
        if name.startswith("__torch__."):
            return Attributes()
        if name not in self.build:
            return Placeholder(name, args)
        self.spend(COST_OF_OBJECT + sum(map(_length, args)))
        return self.build[name](*args)

    def on_build(self, _) -> None:
        state, top = self.stack.pop(), self.stack[-1]
        if isinstance(top, Placeholder | Attributes | OmegaList):
            parts = state.values() if isinstance(state, dict) else state
            parts = parts if isinstance(state, dict | tuple) else ()
            self.spend(_length(state) + sum(map(_length, parts)))
            top.set_state(state)  # others are plain: of a state dict this is its _metadata

    def on_binpersid(self, _) -> None:
        given = self.stack.pop()
        self.stack.append(self.load(given))


OPERATIONS = {
    name.removeprefix("on_").upper(): method
    for name, method in vars(_Machine).items()
    if name.startswith("on_")
}


def _name(what: Any) -> str:
    """The name that a pickle gives to a class or function."""
    if not isinstance(what, Placeholder):
        raise Damaged(f"its pickle uses a {type(what).__name__} as a class")
    return what.name


def _length(value: Any) -> int:
    """What copying this takes, in operations."""
    if isinstance(value, str | bytes):
        return len(value) // 64
    return len(value) if isinstance(value, dict | list | tuple | set | frozenset) else 0


def _pairs(items: list) -> dict:
    """[key, value, key, value, ...] => dict."""
    if len(items) % 2:
        raise Damaged("its pickle has a key without a value")
    return paired(zip(items[::2], items[1::2]))
