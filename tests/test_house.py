"""The house stands as README and utils/__init__.py say: arrows, circles, sizes, maps, light starts.

python -m pytest tests/test_house.py
"""

import argparse
import ast
import os
import re
import runpy
import signal
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from utils import cli

ROOT = Path(__file__).resolve().parents[1]
# From the lowest floor to the highest. A file imports from lower floors, from its own folder, and
# from other folders of its own floor as long as this closes no circle.
FLOORS = (
    ("models/checks", "models/layers"),
    ("models/weights", "models/autoencoders"),
    ("models/backbones",),
    ("models", "loss"),
    ("utils/process",),
    ("utils",),
    ("utils/config",),
    ("utils/data/decoding",),
    ("utils/data",),
    ("utils/data/sources",),
    ("utils/evaluation/images", "utils/evaluation/formulas"),
    ("utils/evaluation/references",),
    ("utils/sampling", "utils/evaluation", "utils/pictures"),
    ("utils/showing", "utils/training/starting"),
    (
        *("utils/training", "utils/cost", "utils/benchmark"),
        *("utils/doctor", "utils/paper", "utils/published", "utils/pipeline", "utils/report"),
    ),
    (".",),
    ("scripts",),
)
FOLDERS = ("models", "loss", "utils", "scripts")
FORBIDDEN = {("utils/evaluation", "utils/sampling")}  # beside the arrows that run upwards
MOST_FILES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 12, 400, 60
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "timm", "accelerate", "lpips"}
HEAVY |= {"matplotlib", "sklearn", "skimage", "scipy"}

FILES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for path in [
        *ROOT.glob("*.py"),
        *(p for d in FLOORS for f in d for p in (ROOT / f).glob("*.py")),
    ]
}
SCRIPTS = sorted(f for f in FILES if "/" not in f or re.match(r"scripts/(?!__init__)", f))


def folder(file: str) -> str:
    return str(Path(file).parent)


def imported_files(tree: ast.AST, files=FILES) -> set[str]:
    """Files of the project that a source imports, anywhere in it: also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {_file_of(alias.name, files) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                as_module = _file_of(f"{node.module}.{alias.name}", files)
                found.add(as_module or _file_of(node.module, files))
    return found - {None}


def _file_of(module: str, files) -> str | None:
    path = module.replace(".", "/")
    return next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in files), None)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


FILE_GRAPH = {file: imported_files(tree) - {file} for file, tree in FILES.items()}


def folder_graph(files: dict[str, set[str]]) -> dict[str, set[str]]:
    graph = {}
    for file, targets in files.items():
        graph.setdefault(folder(file), set()).update(folder(t) for t in targets)
    return {name: targets - {name} for name, targets in graph.items()}


def upward_arrows(files: dict[str, set[str]]) -> list[str]:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    return [
        f"{file} imports {target}"
        for file, targets in files.items()
        for target in sorted(targets)
        if floor[folder(target)] > floor[folder(file)]
        or (folder(file), folder(target)) in FORBIDDEN
    ]


def test_no_import_runs_upwards():
    assert not upward_arrows(FILE_GRAPH)


def test_there_is_no_circle_of_files_or_of_folders():
    assert not circle(FILE_GRAPH)
    assert not circle(folder_graph(FILE_GRAPH))


def test_upward_arrows_and_circles_would_be_found():
    """Also those of an import inside a function, and of one that names a package."""
    sources = {
        "utils/config/__init__.py": "import utils.config.load",
        "utils/config/load.py": "def f():\n    from utils.config import Config",
        "utils/data/base.py": "def f():\n    import train_repae",
        "train_repae.py": "from utils.data import base",
    }
    graph = {file: imported_files(ast.parse(text), sources) for file, text in sources.items()}
    assert upward_arrows(graph) == ["utils/data/base.py imports train_repae.py"]
    assert {"utils/config/load.py", "utils/config/__init__.py"} <= set(circle(graph)) or {
        "utils/data/base.py",
        "train_repae.py",
    } <= set(circle(graph))
    assert set(circle(folder_graph(graph))) == {".", "utils/data"}


def test_every_folder_of_the_house_has_a_floor():
    folders = {folder(str(p.relative_to(ROOT))) for d in FOLDERS for p in (ROOT / d).rglob("*.py")}
    assert folders == {name for names in FLOORS for name in names} - {"."}


def test_folders_files_and_functions_are_small():
    too_large = []
    for name in {folder(f) for f in FILES} - {"scripts"}:
        count = sum(folder(f) == name and Path(f).name != "__init__.py" for f in FILES)
        too_large += [f"{name}: {count} files"] * (count > MOST_FILES)
    for file, tree in FILES.items():
        lines = len((ROOT / file).read_text().splitlines())
        too_large += [f"{file}: {lines} lines"] * (lines > MOST_LINES)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = node.end_lineno - body[0].lineno + 1 if body else 0
                if length > MOST_LINES_OF_A_FUNCTION:
                    too_large.append(f"{file}:{node.lineno} {node.name}: {length} lines")
    assert not too_large


@pytest.mark.parametrize("name", sorted({folder(f) for f in FILES} - {"."}))
def test_the_docstring_of_every_folder_names_each_of_its_files(name):
    doc = ast.get_docstring(FILES[f"{name}/__init__.py"]) or ""
    inside = [p.name for p in (ROOT / name).iterdir() if p.is_file() and p.suffix != ".pyc"]
    lines = [line.split()[0] for line in doc.splitlines() if line.split()]
    assert not [n for n in sorted(inside) if n != "__init__.py" and n not in lines]
    gone = [
        word for word in lines if re.fullmatch(r"\w+\.(py|sh|yaml)", word) and word not in inside
    ]
    assert not gone


def test_every_folder_is_on_a_map():
    """Of the README; a room inside of a folder, in the docstring of that folder."""
    text = (ROOT / "README.md").read_text()
    names = {folder(f) for f in FILES} - {"."} | {"configs", "tests", "docs", "assets"}
    inner = {name for name in names if "/" in name}
    assert not [n for n in sorted(names - inner) if not re.search(rf"^ +{n}/ ", text, re.M)]
    for name in inner:
        outer, _, own = name.rpartition("/")
        doc = ast.get_docstring(FILES[f"{outer}/__init__.py"]) or ""
        assert re.search(rf"^{own}/ ", doc, re.M), name


def test_every_file_that_a_source_names_is_in_the_tree():
    """A path below a folder of the house, or a page of documentation."""
    written = {"tables.md", "results.md"}  # by scripts
    pages = {p.name for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]} | written
    gone = []
    for path in [p for d in (*FOLDERS, "tests", "configs") for p in (ROOT / d).rglob("*.*")]:
        if path.suffix in (".py", ".sh", ".yaml"):
            text = path.read_text()
            named = re.findall(rf"\b(?:{'|'.join(FOLDERS)}|tests)/[\w/-]+\.(?:py|sh|yaml)\b", text)
            gone += [f"{path}: {name}" for name in named if not (ROOT / name).exists()]
            gone += [f"{path}: {n}" for n in re.findall(r"\b[\w-]+\.md\b", text) if n not in pages]
    assert not gone


def test_the_tests_mirror_the_folders():
    folders = {p.parent.relative_to(ROOT / "tests") for p in (ROOT / "tests").rglob("test_*.py")}
    assert not [str(f) for f in folders if not (ROOT / f).is_dir()]


def start(*words: str) -> tuple[str, set[str]]:
    """What a new Python prints, and the top-level names of the modules that it imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0, errors[-3:]
    return done.stdout, set(re.findall(r"^import time: .*\| +(\w+)", done.stderr, re.M))


def test_the_config_is_imported_without_the_slow_libraries():
    _, modules = start("-c", "import utils.config")
    assert "utils" in modules and not modules & HEAVY


def test_help_shows_the_docstring_and_the_defaults():
    parser = cli.Parser("What it does.\n\n    python it.py --num 4")
    parser.add_argument("--num", type=int, default=3, help="images")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    text = parser.format_help()
    assert "\n    python it.py --num 4\n" in text
    assert "images (default: 3)" in text and "of the noise (default: 0)" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_light_and_shows_an_example_and_how_to_override_settings(script):
    """The defaults are there if the parser is that of the test above."""
    text, modules = start(script, "--help")
    assert "argparse" in modules and not modules & HEAVY
    assert re.search(rf"^ *(python|accelerate launch) .*{script}", text, re.M), "no example"
    source = (ROOT / script).read_text()
    assert "cli.Parser(__doc__" in source
    if "add_config_arguments" in source:
        assert "key=value" in text and "run.steps=1000" in text and "utils/config/schema.py" in text


def options(parser: argparse.ArgumentParser):
    """Every argument of a parser and of its commands' parsers, with the help that is printed."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        elif action.default is not argparse.SUPPRESS:
            yield action, parser._get_formatter()._expand_help(action) if action.help else ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_default(script, monkeypatch):
    found = []
    monkeypatch.setattr(cli.Parser, "print_help", lambda parser, file=None: found.append(parser))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    handlers = {number: signal.getsignal(number) for number in cli.SIGNALS}
    try:
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    (parser,) = found
    for action, text in options(parser):
        assert "default: None" not in text and "(default: [])" not in text
        if action.default or (action.default == 0 and action.default is not False):
            assert "default" in text, f"{action.option_strings}: {text}"
