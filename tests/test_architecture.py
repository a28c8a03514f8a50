"""The package's own rules, read from its source: the order of its rooms, doors to the outside, sizes of functions."""

import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import kcdcache

PACKAGE = Path(kcdcache.__file__).parent
ROOMS = [
    "",  # the files at the top
    "files", "datasets", "networks", "views", "store", "teacher", "condensation", "methods", "runs", "training",
    "export", "report", "commands", "recipes", "cli",
]  # fmt: skip
"""a room imports only from itself and from rooms before it"""
DOORS = {
    "filelock": "files", "obstore": "files", "click": "cli", "rich": "cli", "sklearn": "datasets",
    "matplotlib": "report", "jinja2": "export report", "duckdb": "condensation",
    "scipy": "top condensation methods report",
}  # fmt: skip
"""library -> the rooms that may import it, `top` for the files at the top"""
LIGHT = (
    "kcdcache",
    "kcdcache.settings",
    "kcdcache.cli.main",
    "kcdcache.condensation.summary",
    "kcdcache.commands.condense",
)


def room(dotted):
    """Return the room of a module of the package, `` for one at the top."""
    name = dotted.split(".")[1].replace("__main__", "cli") if "." in dotted else ""
    return name if name in ROOMS else ""


def modules(root):
    """Yield (dotted name, tree) of each module."""
    for path in sorted(root.rglob("[!_]*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(["kcdcache", *(part for part in parts if part != "__init__")]), ast.parse(path.read_text())


def imported(tree):
    """Yield the dotted name of everything a module imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def upward(name, tree):
    """Return the imports of a module that lead to a room after its own."""
    own = [other for other in imported(tree) if other.startswith("kcdcache.")]
    return [other for other in own if ROOMS.index(room(other)) > ROOMS.index(room(name))]


def through_other_doors(name, tree):
    libraries = {other.split(".")[0] for other in imported(tree)}
    return [library for library in libraries & set(DOORS) if (room(name) or "top") not in DOORS[library].split()]


@pytest.mark.parametrize("rule", [upward, through_other_doors])
def test_every_module_keeps_the_order_of_the_rooms(rule):
    assert {name: found for name, tree in modules(PACKAGE) if (found := rule(name, tree))} == {}


def test_the_rooms_are_those_that_there_are():
    assert sorted(ROOMS[1:]) == sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (upward, "kcdcache.errors", "from kcdcache.files.atomic import locked"),
        (upward, "kcdcache.views.rules", "def f():\n    import kcdcache.store.reader"),
        (upward, "kcdcache.report.page", "from kcdcache.cli import main"),
        (through_other_doors, "kcdcache.datasets.images", "from filelock import FileLock"),
    ],
)
def test_each_rule_finds_what_breaks_it(rule, name, text):
    assert len(rule(name, ast.parse(text))) == 1


def test_functions_are_small():
    found = [node for _, tree in modules(PACKAGE) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = [
        node.end_lineno - node.body[bool(ast.get_docstring(node)) and len(node.body) > 1].lineno for node in found
    ]
    assert statistics.median(lengths) <= 8
    assert statistics.quantiles(lengths, n=10)[-1] <= 25
    assert max(lengths) <= 60


HEAVY = ("torch", "torchvision", "sklearn", "matplotlib", "scipy")


@pytest.fixture(scope="module")
def loaded():
    """Module -> the heavy libraries that an interpreter has loaded after importing it: the light ones, then a heavy."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    command = [sys.executable, "-c", f"{code}    print(name, *[h for h in {HEAVY} if h in sys.modules])"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [*command, *LIGHT, "kcdcache.store.reader"], capture_output=True, text=True, env=environment, check=True
    )
    return {name: heavy for name, *heavy in map(str.split, done.stdout.splitlines())}


def test_light_modules_load_no_heavy_library_and_the_check_sees_heavy_ones(loaded):
    assert {name: heavy for name, heavy in loaded.items() if heavy} == {"kcdcache.store.reader": ["torch"]}
    assert loaded.keys() > set(LIGHT)
