"""One Python file out of several of this repository: what some names need, and nothing else.

diffusers fetches a single file for each custom component. `bundle` copies, as they are written, the
definitions at the top level of our modules that the entries reach, follows `from models.x import y`
wherever it stands, and joins the imports of libraries at the top. What it cannot carry over safely
is refused with a `BundleError`: two definitions of one name, renamed imports of ours, modules of
ours as objects, code that runs at the import of a module.
"""

import ast
import builtins
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINE = 100  # characters of the longest line
RULE = "# " + "-" * 86


class BundleError(Exception):
    """Source code that cannot be bundled; the message says where and why."""


@dataclass(frozen=True, order=True)
class Import:
    """A name that an import binds: `from module import name as bound`, or without name
    `import module as bound`."""

    module: str
    name: str | None
    bound: str


@dataclass
class Module:
    """What stands at the top level of a module."""

    name: str
    lines: list[str]
    doc: str = ""
    # name => the statements that make it, in their order
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    # name => its import
    imports: dict[str, Import] = field(default_factory=dict)


def bundle(entries: Sequence[str], doc: str, root: Path = ROOT) -> str:
    """The source of a module with `entries`, like "models.sit.SiT", and what they need of the
    modules below `root`. `doc`: its docstring."""
    tree = Reached(root)
    for entry in entries:
        module, _, name = entry.rpartition(".")
        if name not in tree.module(module).definitions:
            raise BundleError(f"{module} defines no {name}")
        tree.reach(module, name)
    tree.check_names()
    parts = [f'"""{doc.strip()}\n"""', "from __future__ import annotations"]
    parts += [text for text in tree.import_blocks() if text]
    parts += [tree.section(module) for module in tree.in_order()]
    text = "\n\n".join(parts) + "\n"
    ast.parse(text)  # what has been cut out wrongly is found here
    return text


class Reached:
    """The definitions that are needed, of the modules below `root`."""

    def __init__(self, root: Path):
        self.root, self.modules = root, {}
        self.kept: dict[str, set[str]] = {}  # module => names of its definitions
        self.libraries: set[Import] = set()
        self.own_imports: dict[str, list[ast.ImportFrom]] = {}  # inside functions, by module

    def module(self, name: str) -> Module:
        if name not in self.modules:
            path = self.path(name)
            if path is None:
                raise BundleError(f"no module {name} below {self.root}")
            self.modules[name] = read_module(name, path, self)
        return self.modules[name]

    def path(self, module: str) -> Path | None:
        """The file of a module of ours; None for those of libraries."""
        place = self.root.joinpath(*module.split("."))
        files = (place.with_suffix(".py"), place / "__init__.py")
        return next((file for file in files if file.is_file()), None)

    def reach(self, module: str, name: str) -> None:
        """Keep the definition of a name, and all that it needs."""
        found = self.module(module)
        if name in found.imports:
            self._follow(found.imports[name], module)
        elif name in found.definitions and name not in self.kept.setdefault(module, set()):
            self.kept[module].add(name)
            for statement in found.definitions[name]:
                self._reach_inside(module, statement)

    def _reach_inside(self, module: str, statement: ast.stmt) -> None:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                self.reach(module, node.id)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                self._reach_import_inside(module, node)

    def _reach_import_inside(self, module: str, node: ast.Import | ast.ImportFrom) -> None:
        """An import inside a function: that of a library stays there, that of ours goes."""
        ours = [found for found in imports_of(node) if self.path(found.module)]
        for found in ours:
            self._follow(found, module)
        if ours and isinstance(node, ast.ImportFrom):
            self.own_imports.setdefault(module, []).append(node)

    def _follow(self, found: Import, module: str) -> None:
        if not self.path(found.module):
            self.libraries.add(found)
            return
        if found.name is None or self.path(f"{found.module}.{found.name}"):
            raise BundleError(f"{module} imports {found.bound} of {found.module} as an object")
        if found.name != found.bound:
            raise BundleError(f"{module} imports {found.name} of {found.module} as {found.bound}")
        target = self.module(found.module)
        if found.name not in target.definitions.keys() | target.imports.keys():
            raise BundleError(f"{found.module} defines no {found.name}, which {module} imports")
        self.reach(found.module, found.name)

    def check_names(self) -> None:
        """`BundleError` for a name that would mean two things in one file, or hide a builtin."""
        owners: dict[str, set[str]] = {}
        for module, names in self.kept.items():
            for name in names:
                owners.setdefault(name, set()).add(module)
        for library in self.libraries:
            source = f"{library.module}.{library.name}" if library.name else library.module
            owners.setdefault(library.bound, set()).add(source)
        for name, places in sorted(owners.items()):
            if len(places) > 1:
                raise BundleError(f"{name} means several things: {', '.join(sorted(places))}")
            if hasattr(builtins, name):
                raise BundleError(f"{places.pop()} defines {name}, which is a builtin")

    def in_order(self) -> list[str]:
        """The modules, each after those that it imports at its top."""
        graph = {
            name: {i.module for i in self.modules[name].imports.values()} & self.kept.keys()
            for name in sorted(self.kept)
        }
        return list(TopologicalSorter(graph).static_order())

    def import_blocks(self) -> list[str]:
        """The imports of the standard library, and of others."""
        blocks: list[list[Import]] = [[], []]
        for found in sorted(self.libraries, key=lambda i: (i.name is not None, i.module, i.bound)):
            blocks[found.module.split(".")[0] not in sys.stdlib_module_names].append(found)
        return ["\n".join(import_lines(block)) for block in blocks]

    def section(self, module: str) -> str:
        """What is kept of a module, under its name and docstring."""
        found, kept = self.modules[module], self.kept[module]
        head = [RULE, f"# {self.path(module).relative_to(self.root)}"]  # type: ignore[union-attr]
        head += ["#", *(f"# {line}".rstrip() for line in found.doc.splitlines())] * bool(found.doc)
        statements = {id(s): s for name in kept for s in found.definitions[name]}
        chosen = sorted(statements.values(), key=lambda s: s.lineno)
        texts = [self._text(module, statement) for statement in chosen]
        body = texts[0]
        for before, after, text in zip(chosen, chosen[1:], texts[1:]):
            both_plain = not isinstance(before, BLOCKS) and not isinstance(after, BLOCKS)
            body += ("\n" if both_plain else "\n\n\n") + text
        return "\n".join(head) + "\n\n\n" + body

    def _text(self, module: str, statement: ast.stmt) -> str:
        """The lines of a statement and of the comments right above it, without the imports of ours
        in it."""
        lines = self.modules[module].lines
        decorators = getattr(statement, "decorator_list", [])
        start = min(node.lineno for node in (statement, *decorators)) - 1
        while start and lines[start - 1].lstrip().startswith("#"):
            start -= 1
        dropped = set()
        for node in self.own_imports.get(module, []):
            dropped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        text, gone = [], False
        for number in range(start + 1, (statement.end_lineno or start) + 1):
            line = lines[number - 1]
            if number not in dropped and not (gone and not line.strip()):
                text.append(line)
            gone = number in dropped
        return textwrap.dedent("\n".join(text))  # it may stand under `if TYPE_CHECKING`


BLOCKS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def read_module(name: str, path: Path, tree: Reached) -> Module:
    """`BundleError` for a statement at the top level that is neither an import nor a definition."""
    source = path.read_text(encoding="utf-8")
    parsed = ast.parse(source)
    module = Module(name, source.splitlines(), ast.get_docstring(parsed) or "")
    for statement in statements_of(parsed.body[bool(module.doc) :], name):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for found in imports_of(statement):
                module.imports[found.bound] = found
            continue
        for target in names_of(statement, f"{path.name}:{statement.lineno}"):
            module.definitions.setdefault(target, []).append(statement)
    return module


def statements_of(body: list[ast.stmt], module: str) -> Iterator[ast.stmt]:
    """The statements at the top level, and those for type checkers: annotations need them, and no
    annotation is evaluated in a bundle unless it is asked for."""
    for statement in body:
        test = ast.unparse(statement.test) if isinstance(statement, ast.If) else ""
        if test == "TYPE_CHECKING":
            assert isinstance(statement, ast.If)
            yield from statement.body
        elif test != "__name__ == '__main__'":
            yield statement


def imports_of(node: ast.Import | ast.ImportFrom) -> list[Import]:
    if isinstance(node, ast.ImportFrom):
        if node.level:
            raise BundleError(f"line {node.lineno}: a relative import")
        return [Import(node.module or "", a.name, a.asname or a.name) for a in node.names
                if node.module != "__future__"]  # fmt: skip
    return [Import(a.name, None, a.asname or a.name.split(".")[0]) for a in node.names]


def names_of(statement: ast.stmt, where: str) -> list[str]:
    """The names that a statement defines, or changes."""
    if isinstance(statement, BLOCKS):
        return [statement.name]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    found = [t for target in targets for t in getattr(target, "elts", [target])]
    if not found or not all(isinstance(target, ast.Name) for target in found):
        text = ast.unparse(statement).splitlines()[0]
        raise BundleError(f"{where}: {text!r} is no definition of a name")
    return [target.id for target in found if isinstance(target, ast.Name)]


def import_lines(found: list[Import]) -> list[str]:
    """Plain imports, then one `from` for each module."""
    lines, by_module = [], {}
    for item in found:
        if item.name is None:
            bound = item.module.split(".")[0]
            lines.append(f"import {item.module}" + f" as {item.bound}" * (item.bound != bound))
        else:
            renamed = f" as {item.bound}" * (item.bound != item.name)
            by_module.setdefault(item.module, []).append(item.name + renamed)
    for module, names in by_module.items():
        line = f"from {module} import {', '.join(names)}"
        if len(line) > LINE:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
        lines.append(line)
    return lines
