"""From the text of a value to a value of the type of its setting."""

import re
from dataclasses import Field
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin

from yaml.nodes import Node, ScalarNode, SequenceNode

from models.checks.errors import UserError
from utils.config.reading import parse_yaml, show, show_text
from utils.files import expand_path, is_one_line

NONE = ("null", "Null", "NULL", "none", "None", "NONE", "")
HOME = "~"  # none in YAML, and a home folder for a path
WHOLE = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
NOT_FINITE = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)
LONGEST_NUMBER = 40  # characters


def override_node(text: str, declared: Field, name: str) -> Node:
    """What stands behind `=`, as a file would give it: a list is YAML, anything else as it is."""
    if text == "":
        hint = f": write {name}=null for none" if get_origin(declared.type) is UnionType else ""
        raise UserError(f"{name}= has no value{hint}")
    if get_origin(declared.type) is list:
        return parse_yaml(text, show_text(f"{name}={text}")) or ScalarNode("ScalarNode", text)
    return ScalarNode("ScalarNode", text)


def convert(node: Node, declared: Field, name: str, expand: bool = True) -> Any:
    """The value of the setting `name`, its paths expanded; without `expand` they stay as they are.
    `UserError` with the value and what was expected."""
    prefix = declared.metadata.get("path") if expand else None
    return _convert(node, declared.type, name, declared.metadata.get("choices"), prefix)


def _convert(
    node: Node, kind: Any, name: str, choices: tuple[str, ...] | None, prefix: str | None
) -> Any:
    plain = isinstance(node, ScalarNode) and not node.style  # not in quotes
    optional = get_origin(kind) is UnionType
    if plain and node.value == HOME and prefix is not None:
        raise UserError(
            f"{name}=~ may mean two things: write $HOME for the home folder, null for none"
        )
    is_none = plain and node.value in (*NONE, HOME)
    if optional:
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
        if is_none:
            return None
    if get_origin(kind) is list:
        if not isinstance(node, SequenceNode):
            example = "[]" if is_none else f"[{show(node)}]"
            _refuse(node, name, f"a list, e.g. {name}={example}")
        (inner,) = get_args(kind)
        items: list[Any] = list(node.value)
        return [
            _convert(item, inner, f"{name}[{i}]", choices, prefix) for i, item in enumerate(items)
        ]
    if get_origin(kind) is Literal:
        kind, choices = str, get_args(kind)
    if not isinstance(node, ScalarNode):
        _refuse(node, name, "a single value")
    if choices:
        return node.value if node.value in choices else _refuse(node, name, _one_of(choices))
    if kind is str:
        return _text(node, name, is_none, prefix)
    return {bool: _bool, int: _whole, float: _number}[kind](node, name)


def _text(node: Node, name: str, is_none: bool, prefix: str | None) -> str:
    """The text as it stands, but for `~` and variables in a path."""
    if is_none:
        _refuse(node, name, "a text, and this setting cannot be none")
    text = node.value
    if not is_one_line(text):
        _refuse(node, name, "a text of one line without control characters, in UTF-8")
    if prefix is None:
        return text
    match = re.match(prefix, text)
    before = match[0] if match else ""
    try:
        return before + expand_path(text[len(before) :])
    except UserError as error:
        raise UserError(f"{name}={error}") from None


def _bool(node: Node, name: str) -> bool:
    word = node.value.lower()
    return word == "true" if word in ("true", "false") else _refuse(node, name, "true or false")


def _whole(node: Node, name: str) -> int:
    text = node.value
    if len(text) <= LONGEST_NUMBER and WHOLE.fullmatch(text):
        return int(text)
    if len(text) <= LONGEST_NUMBER and NUMBER.fullmatch(text):
        value = float(text.replace("_", ""))
        if value.is_integer() and abs(value) < 2**53:
            return int(value)
    _refuse(node, name, "a whole number")


def _number(node: Node, name: str) -> float:
    text = node.value
    fits = NUMBER.fullmatch(text) or NOT_FINITE.fullmatch(text)
    if not fits or len(text) > LONGEST_NUMBER:
        _refuse(node, name, "a number")
    return float(text.replace("_", "").replace(".i", "i").replace(".n", "n"))


def _one_of(choices: tuple[str, ...]) -> str:
    return f"one of {', '.join(choices)}"


def _refuse(node: Node, name: str, expected: str) -> NoReturn:
    raise UserError(f"{name}={show(node)}: expected {expected}")
