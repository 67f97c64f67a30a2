"""From YAML to nodes in which every value is still a text.

YAML's own types are not used: they would make 256 of 0400, 4530 of 1:15:30, true of `on`, and of
1e-4 a text. A value gets the type of its setting, in files and overrides alike (values.py).
"""

from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from models.checks.errors import UserError

LARGEST = 2**20  # bytes of a file; ours have 10 kB


class Loader(yaml.SafeLoader):
    """A loader that gives every node the tag of its kind, whatever it looks like. It is used for
    nodes alone: no Python object is ever made of them."""

    def resolve(self, kind: type[Node], value: object, implicit: object) -> str:
        return kind.__name__


def read_yaml(path: Path) -> MappingNode:
    """The mapping that a YAML file holds; `UserError` if it is no regular file, not readable, not
    UTF-8, not YAML, or something else than a mapping."""
    return as_mapping(parse_yaml(_text(path), str(path)), str(path))


def parse_yaml(text: str, origin: str) -> Node | None:
    """The node of one YAML document, None if it is empty; `UserError` naming `origin`."""
    try:
        node = yaml.compose(text, Loader)
        return _checked(node, origin) if node else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{origin} is not YAML: {' '.join(str(problem).split())}{place}") from None
    except RecursionError:
        raise UserError(f"{origin} is no config: it is nested too deeply") from None


def _text(path: Path) -> str:
    """The text of a file, without the mark that some editors put in front of UTF-8."""
    try:
        if not path.is_file():
            kind = "is no regular file" if path.exists() or path.is_symlink() else "does not exist"
            raise UserError(f"no config at {path}, which {kind}: configs/ holds those that come "
                            "with the repository")  # fmt: skip
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is no config: it has more than {LARGEST} bytes")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}): save it as such") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def as_mapping(node: Node | None, origin: str) -> MappingNode:
    """`node`, if it is a mapping that is not empty; else a `UserError` naming `origin`."""
    if isinstance(node, MappingNode) and node.value:
        return node
    kind = "is empty" if node is None or isinstance(node, MappingNode) else f"holds {show(node)}"
    raise UserError(f"{origin} is no config: it {kind}, expected sections as in configs/")


def _checked(root: Node, origin: str) -> Node:
    """`root`, if no node in it names a type of its own, such as !!python/object."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if node.tag != type(node).__name__:
            line = node.start_mark.line + 1
            raise UserError(f"{origin} names a type, {node.tag!r} (line {line}): remove it; types "
                            "are those of the settings, and quotes make a text")  # fmt: skip
        if not isinstance(node, ScalarNode):
            pairs = isinstance(node, MappingNode)
            waiting += [part for pair in node.value for part in pair] if pairs else node.value
    return root


def show(node: Node) -> str:
    """A value for a message: a text shortened and in one line, of anything else its kind."""
    if isinstance(node, ScalarNode):
        return show_text(node.value)
    return "a mapping" if isinstance(node, MappingNode) else "a list"


def show_text(text: str) -> str:
    text = text if len(text) <= 60 else f"{text[:60]}..."
    return text if text.isprintable() else repr(text)
