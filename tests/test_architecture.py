"""The package's own rules, read from its source: levels of modules, doors to the outside, names and sizes."""

import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import kcdcache

PACKAGE = Path(kcdcache.__file__).parent
LEVELS = (
    "errors rng shares",
    "places crashpoints",
    "untrusted pages frames helptexts options signals together corruption remote display",
    "files parallel",
    "cachefiles leases",
    "mirror",
    "tables records rates decoding chunkfiles rules scratch",
    "partitioned",
    "foreign",
    "config identity encoding schedule values images archives folder",
    "facts commands exported grid sources dataspec parameters origin",
    "partial card",
    "data views models losses mixing manifest layout ledger surroundings",
    "ranking",
    "condense screening fields attack sampling prefetch",
    "terms",
    "catalogue",
    "store streamed teacher methods runs inspection holding",
    "writer audit knowledge matching condenser learner jobs difference",
    "mixes",
    "batches evaluate runcheck capture condensed",
    "resident",
    "loop costs fidelity",
    "precompute fit train",
    "requery repair handover",
    "distill",
    "steps listing",
    "pairing tabular findings history",
    "accounts",
    "provenance figures gallery",
    "stagefigures chain robustness",
    "report",
    "checks recipe export",
    "cli",
    "__main__",
)
"""every module, in the order of DESIGN.md section 2: one imports only from lines above its own"""
PACKAGES = ("models", "losses", "terms")
LIGHT = [
    "rng",
    "identity",
    "values",
    "schedule",
    "manifest",
    "condense",
    "sources",
    "condenser",
    "inspection",
    "config",
    "exported",
    "difference",
]
DOORS = {
    "zarr": "store",
    "obstore": "cloud",
    "print": "cli",
    "sys.exit": "cli",
    "import inside a function": "cli cloud",
}
"""what only one module may do -> that module"""


def place_of(name):
    """Return the number of a module's line, or None if the list lacks it."""
    return next((number for number, line in enumerate(LEVELS) if name in line.split()), None)


def module_name(path, root):
    """Return the name a file goes by in the list; files of models/ and losses/ go by their folder's."""
    relative = path.relative_to(root)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def sources(root):
    return {path: ast.parse(path.read_text()) for path in sorted(root.rglob("*.py")) if path != root / "__init__.py"}


def imported_modules(tree):
    """Yield (line, absolute dotted name) of everything a module imports, names of `from` imports included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward(path, tree, root):
    own = module_name(path, root)
    for line, dotted in imported_modules(tree):
        first, _, rest = dotted.partition(".")
        other = rest.split(".")[0]
        if first != "kcdcache" or (own in PACKAGES and other == own) or None in (place_of(own), place_of(other)):
            continue
        if place_of(other) >= place_of(own):
            yield f"{path.name}:{line}: {own} imports {other}, which is not above it"


def relative(path, tree, root):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{path.name}:{node.lineno}: relative import"


def called_name(node):
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def imports_constant(node):
    loads = called_name(node) in ("importlib.import_module", "import_module", "__import__")
    return loads and isinstance(node.args[0], ast.Constant)


def doings(tree):
    """Yield (line, key of DOORS) of what only one module may do."""
    for node in ast.walk(tree):
        if called_name(node) in ("print", "sys.exit", "exit", "os._exit"):
            yield node.lineno, "print" if called_name(node) == "print" else "sys.exit"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom) or imports_constant(n)]
            yield from ((n.lineno, "import inside a function") for n in inside)
    libraries = ((line, dotted.split(".")[0]) for line, dotted in imported_modules(tree))
    yield from ((line, name) for line, name in libraries if name in ("zarr", "obstore"))


def through_other_doors(path, tree, root):
    for line, what in doings(tree):
        if module_name(path, root) not in DOORS[what].split():
            yield f"{path.name}:{line}: {what} outside {DOORS[what].split()[0]}.py"


def unlisted(path, tree, root):
    if place_of(module_name(path, root)) is None:
        yield f"{path.name}: not on the list of levels"


def public_definitions(body):
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from public_definitions(node.body if isinstance(node, ast.ClassDef) else [])


def undocumented(path, tree, root):
    if not ast.get_docstring(tree):
        yield f"{path.name}: no docstring"
    for node in public_definitions(tree.body):
        if not ast.get_docstring(node):
            yield f"{path.name}:{node.lineno}: {node.name} has no docstring"


def length(node):
    """Return a function's lines without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    return lines - (first.end_lineno - first.lineno + 1) if ast.get_docstring(node) else lines


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def oversized(path, tree, root):
    if (lines := len(path.read_text().splitlines())) > 800:
        yield f"{path.name}: {lines} lines, at most 800"
    for node in functions(tree):
        if length(node) > 60:
            yield f"{path.name}:{node.lineno}: {node.name} has {length(node)} lines, at most 60"


RULES = (upward, relative, through_other_doors, unlisted, undocumented, oversized)


def faults(rule, root):
    return [fault for path, tree in sources(root).items() for fault in rule(path, tree, root)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert faults(rule, PACKAGE) == []


def test_the_list_of_levels_names_no_module_twice_and_none_that_is_gone():
    listed = [name for line in LEVELS for name in line.split()]
    there = {module_name(path, PACKAGE) for path in sources(PACKAGE)}
    assert sorted(listed) == sorted(there)


@pytest.mark.parametrize(
    ("rule", "file", "text", "fault"),
    [
        (upward, "errors.py", "from kcdcache.settings import Settings", "errors imports config"),
        (upward, "errors.py", "import kcdcache.cli.main", "errors imports cli"),
        (upward, "files.py", "from kcdcache import errors, tables", "files imports tables"),
        (upward, "writer.py", "def f():\n    from kcdcache import steps", "writer imports steps"),
        (upward, "models/net.py", "from kcdcache.methods.losses import entropy", "models imports losses"),
        (relative, "values.py", "from . import files", "values.py:1: relative import"),
        (relative, "models/net.py", "from ..files import locked", "relative import"),
        (through_other_doors, "layout.py", "import zarr", "zarr outside store.py"),
        (through_other_doors, "store.py", "import obstore", "obstore outside cloud.py"),
        (through_other_doors, "layout.py", "from zarr.storage import LocalStore", "zarr outside store.py"),
        (through_other_doors, "fit.py", "def f():\n    print(1)", "fit.py:2: print outside cli.py"),
        (through_other_doors, "fit.py", "import sys\nsys.exit(1)", "fit.py:2: sys.exit outside cli.py"),
        (through_other_doors, "fit.py", "def f():\n    import json", "fit.py:2: import inside a function"),
        (through_other_doors, "fit.py", "def f():\n    from json import loads", "import inside a function"),
        (through_other_doors, "fit.py", "f = lambda: __import__('json')", "import inside a function"),
        (through_other_doors, "fit.py", "def f():\n    importlib.import_module('json')", "import inside a function"),
        (unlisted, "novelty.py", "", "novelty.py: not on the list"),
        (undocumented, "values.py", "def _f(): ...", "values.py: no docstring"),
        (undocumented, "values.py", '"""Doc."""\nclass C:\n    """Doc."""\n    def f(self): ...', "f has no docstring"),
        (oversized, "values.py", "\n" * 801, "values.py: 801 lines"),
        (oversized, "values.py", "def f():\n" + "    1\n" * 60, "f has 61 lines"),
    ],
)
def test_each_rule_finds_what_breaks_it(tmp_path, rule, file, text, fault):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    found = faults(rule, tmp_path)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("rule", "file", "text"),
    [
        (upward, "models/net.py", "from kcdcache.networks.resnet import ResNet\nfrom kcdcache import config"),
        (upward, "values.py", "import numpy\nfrom kcdcache.files.parquet import digest"),
        (through_other_doors, "cli.py", "def f():\n    import json\n    print(json)\n    sys.exit(0)"),
        (through_other_doors, "store.py", "import zarr"),
        (through_other_doors, "fit.py", "def f(name):\n    return importlib.import_module(name)"),
        (undocumented, "values.py", '"""Doc."""\ndef _f(): ...\nclass _C:\n    def f(self): ...'),
    ],
)
def test_no_rule_refuses_what_is_allowed(tmp_path, rule, file, text):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert faults(rule, tmp_path) == []


def test_the_package_itself_imports_nothing():
    assert not list(imported_modules(ast.parse((PACKAGE / "__init__.py").read_text())))


def test_functions_are_small():
    lengths = [length(node) for tree in sources(PACKAGE).values() for node in functions(tree)]
    assert statistics.median(lengths) <= 8
    assert statistics.quantiles(lengths, n=10)[-1] <= 25


def test_the_docstring_is_not_counted_as_code():
    one, two = functions(ast.parse('def f():\n    """A.\n\n    B."""\n    1\n\ndef g():\n    1\n    2\n'))
    assert (length(one), length(two)) == (2, 3)


def loaded(module):
    """Return which of the heavy libraries a fresh interpreter has loaded after importing a module."""
    code = f"import sys, {module}; print(*[name for name in ('torch', 'zarr', 'pydantic') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_load_neither_torch_nor_zarr(name):
    assert set(loaded(f"kcdcache.{name}")) <= {"pydantic"}


def test_the_check_of_light_modules_sees_heavy_ones():
    assert loaded("kcdcache.store.reader") == ["torch", "zarr", "pydantic"]
