"""kcdcache: run the teacher once, keep what matters, teach any student.

`import kcdcache as kc` takes no time: torch is imported with the first function that is used.
Its types are in `__init__.pyi`, so that nothing here imports the rooms, which import this.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0.dev0"
__all__ = [
    "Run", "condense", "data", "evaluate", "fit", "loader", "open_condensed", "open_run", "open_store", "points",
    "precompute", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Return a function of the Python API, see `kcdcache.commands.api`."""
    if name not in __all__:
        raise AttributeError(f"module 'kcdcache' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module("kcdcache.commands.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
