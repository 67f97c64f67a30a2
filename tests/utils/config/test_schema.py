"""The schema: every setting is read by the code, and its comment stands above it.

python -m pytest tests/utils/config
"""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from utils.config import looking, losses, schema
from utils.config.schema import Config, DataConfig

ROOT = Path(__file__).resolve().parents[3]
CODE = [*ROOT.glob("*.py"), *(p for d in ("utils", "scripts") for p in (ROOT / d).rglob("*.py"))]
CHECKS = ("load.py", "validate.py")  # checking a setting is not using it


class Reads(ast.NodeVisitor):
    """Collects (class, field) of every config field that a source reads as an attribute.

    An expression's class is known if it is a parameter annotated with a class of the schema, a
    field of a known class, a local variable or attribute of self that has been given such a value,
    or else any variable or attribute called `config` or `c`.
    """

    def __init__(self, classes: dict[str, type]):
        self.classes, self.scopes, self.found = classes, [{}], set()
        self.attributes: dict[str, type] = {}  # of self, in the class that is being visited

    def class_of(self, node: ast.AST) -> type | None:
        if isinstance(node, ast.Name):
            known = next((s[node.id] for s in reversed(self.scopes) if node.id in s), None)
            return known or (self.classes["Config"] if node.id in ("config", "c") else None)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.class_of(node.value)
        if owner is None and node.attr in self.attributes and is_self(node.value):
            return self.attributes[node.attr]
        if owner is None:
            return self.classes["Config"] if node.attr in ("config", "c") else None
        return section_of(owner, node.attr)

    def visit_Attribute(self, node):
        owner = self.class_of(node.value)
        if owner is not None:
            self.found.add((owner, node.attr))
        self.generic_visit(node)

    def visit_Assign(self, node):
        for target in node.targets:
            several = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            for name, value in (
                zip(target.elts, node.value.elts) if several else [(target, node.value)]
            ):
                if isinstance(name, ast.Name):
                    self.scopes[-1][name.id] = self.class_of(value)
                elif isinstance(name, ast.Attribute) and is_self(name.value):
                    self.attributes[name.attr] = self.class_of(value)
        self.generic_visit(node)

    def visit_FunctionDef(self, node):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = {
            a.arg: self.classes[a.annotation.id]
            for a in arguments
            if isinstance(a.annotation, ast.Name) and a.annotation.id in self.classes
        }
        if self.scopes[-1].get("class") is not None and arguments[:1]:
            scope[arguments[0].arg] = self.scopes[-1]["class"]  # self
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_ClassDef(self, node):
        self.scopes.append({"class": self.classes.get(node.name)})
        self.attributes = {}
        self.generic_visit(node)
        self.scopes.pop()


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def section_of(owner: type, name: str) -> type | None:
    """The class of a section, None for a setting and for what is no field."""
    default = next((f.default_factory for f in fields(owner) if f.name == name), None)
    return default if is_dataclass(default) else None


def classes_below(owner: type) -> Iterator[type]:
    yield owner
    for f in fields(owner):
        section = section_of(owner, f.name)
        if section:
            yield from classes_below(section)


def unread(config: type, sources: Iterable[str]) -> list[str]:
    """ "Class.field" of every field below `config` that no source reads."""
    classes = list(dict.fromkeys(classes_below(config)))
    reads = Reads({c.__name__: c for c in classes} | {"Config": config})
    for source in sources:
        reads.visit(ast.parse(source))
    all_fields = [(c, f.name) for c in classes for f in fields(c)]
    return [f"{c.__name__}.{name}" for c, name in all_fields if (c, name) not in reads.found]


def test_every_field_is_read_somewhere_and_a_new_one_is_not():
    sources = [p.read_text() for p in CODE if p.parent.name != "config" or p.name not in CHECKS]
    assert unread(Config, sources) == []
    new = [("steps", int, 1)]  # other sections have a field of that name, which is read
    data = make_dataclass("DataConfig", new, bases=(DataConfig,))
    config = make_dataclass(
        "Config", [("data", data, field(default_factory=data))], bases=(Config,)
    )
    assert unread(config, sources) == ["DataConfig.steps"]


@dataclass
class SmallSection:
    steps: int = 1
    name: str = "a"
    path: str = "b"
    train: bool = True
    depth: int = 1


@dataclass
class SmallConfig:
    run: SmallSection = field(default_factory=SmallSection)


def test_a_field_that_nothing_reads_is_found_however_common_its_name():
    """Attributes of other objects of the same name do not count."""
    source = """
class C:
    def __init__(self, small: SmallSection):
        self.config = small
        self.config.name

def f(config, args, net: Network):
    run, seed = config.run, 0
    net.train(), args.path, args.run.depth
    return run.steps
"""
    lacking = [f"SmallSection.{name}" for name in ("path", "train", "depth")]
    assert unread(SmallConfig, [source]) == lacking


@pytest.mark.parametrize("module", [schema, losses, looking])
def test_a_comment_stands_above_every_setting_and_none_behind_one(module):
    for before, line in pairwise(inspect.getsource(module).splitlines()):
        if re.match(r"    \w+: [^#]* = (?!field\(default_factory=\w+Config\))", line):
            assert before.startswith("    # "), line
        assert not re.search(r"\S  # ", line), line
