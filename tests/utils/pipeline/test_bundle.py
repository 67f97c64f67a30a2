"""Bundling on small made-up modules: what is reached is copied as it is, all else is left out.

python -m pytest tests/utils/pipeline/test_bundle.py
"""

import ast

import pytest

from utils.pipeline.bundle import BundleError, bundle
from utils.pipeline.sources import pipeline_source, sit_source

HOUSE = {
    "lib/__init__.py": "",
    "lib/numbers.py": '''
        """Numbers of all kinds."""

        import os
        from math import pi, tau

        LARGE = 10**6  # more than enough
        # of a circle
        TURN = tau
        TABLE = {"half": pi}
        TABLE |= {"full": TURN}


        def unused():
            return os.getcwd()
        ''',
    "lib/shapes.py": '''
        from __future__ import annotations

        from typing import TYPE_CHECKING, Any

        from lib.numbers import TABLE, unused

        if TYPE_CHECKING:
            from collections.abc import Callable

            Angle = Callable[[float], Any]


        class Unused:
            """Nobody wants this one."""


        # The area of everything.
        @staticmethod
        def area(r: float, how: Angle | None = None) -> float:
            """Of a circle."""
            from lib.late import double

            return TABLE["half"] * r * r if how is None else double(how(r))


        if __name__ == "__main__":
            unused()
        ''',
    "lib/late.py": """
        import math


        def double(x):
            return 2 * math.floor(x)
        """,
}


@pytest.fixture
def house(tmp_path):
    def write(**changes):
        files = HOUSE | {name.replace("__", "/") + ".py": text for name, text in changes.items()}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            lines = [line.removeprefix(" " * 8) for line in text.strip("\n").splitlines()]
            (tmp_path / name).write_text("\n".join(lines).rstrip() + "\n")
        return tmp_path

    return write


def test_what_is_reached_is_copied_and_nothing_else(house):
    text = bundle(["lib.shapes.area"], "Shapes.", house())
    found = {}
    exec(compile(text, "bundle", "exec"), found)
    assert found["__doc__"] == "Shapes.\n"
    assert found["area"](2.0) == pytest.approx(12.566, abs=1e-3)
    assert found["area"](3.7, float) == 6
    assert not {"unused", "Unused", "LARGE", "os", "Path"} & found.keys()
    assert found["TABLE"] == {"half": found["pi"], "full": found["tau"]}
    assert "# of a circle\nTURN = tau\n" in text and "# The area of everything.\n@static" in text
    assert '    """Of a circle."""\n    return' in text  # without the import inside
    assert "# lib/numbers.py\n#\n# Numbers of all kinds.\n" in text
    assert text.index("TABLE = ") < text.index("def area")
    assert text.index("import math\n") < text.index("from math import pi, tau")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lib__late": "from math import tau as TABLE\ndef double(x): return TABLE"},
         "TABLE means several things: lib.numbers, math.tau"),
        ({"lib__late": "def helper(): ...\ndef double(x): return TURN\nTURN = 1"},
         "TURN means several things: lib.late, lib.numbers"),
        ({"lib__late": "from lib.numbers import TURN as T\ndef double(x): return T"},
         "lib.late imports TURN of lib.numbers as T"),
        ({"lib__late": "from lib import numbers\ndef double(x): return numbers"},
         "lib.late imports numbers of lib as an object"),
        ({"lib__late": "import lib.numbers\ndef double(x): return lib.numbers.TURN"},
         "lib.late imports lib of lib.numbers as an object"),
        ({"lib__late": "def double(x):\n    import lib.numbers"},
         "lib.late imports lib of lib.numbers as an object"),
        ({"lib__late": "def double(x): return x\nprint(double(1))"},
         r"late.py:2: 'print\(double\(1\)\)' is no definition"),
        ({"lib__late": "from .numbers import TURN\ndef double(x): return TURN"},
         "a relative import"),
        ({"lib__late": "def double(x): return sum(x)\ndef sum(x): return x"},
         "lib.late defines sum, which is a builtin"),
        ({"lib__late": "def triple(x): return x"}, "lib.late defines no double"),
    ],
)  # fmt: skip
def test_what_cannot_be_carried_over_is_refused(changes, said, house):
    with pytest.raises(BundleError, match=said):
        bundle(["lib.shapes.area"], "Shapes.", house(**changes))


@pytest.mark.parametrize("source", [pipeline_source, sit_source])
def test_the_code_of_exports_imports_no_module_of_ours(source):
    text, ours = source(), {"models", "loss", "utils", "scripts", "tests"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in ours
        elif isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & ours
    assert "Copyright (c)" in text and "scripts/export_pipeline.py" in text
    assert max(map(len, text.splitlines())) <= 102  # docstrings of modules become comments
    heavy = ("import timm", "argparse", "triton", "VAES", "load_vae", "class ModelIndex")
    assert not [word for word in heavy if word in text]
    assert len(text.splitlines()) < 1200
