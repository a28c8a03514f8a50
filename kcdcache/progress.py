"""Progress of long work, reported to a function that it is given."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""called with the name of the work, how much is done, the total, and a remark; the name `epoch` is that of training"""
Inside = Callable[[str, float, int], None]
"""called with the name of the work, how much is done (with fractions: 3.5 epochs), and the total"""
EPOCH = "epoch"
"""name of the work of `fit` and `train`, told epoch by epoch"""


def silent(what: str, done: int, total: int, remark: str) -> None:
    """Report no progress."""


def inside(progress: Progress) -> Inside | None:
    """Return where to report how far one piece of work (an epoch) has come, or None: only bars show that."""
    return getattr(progress, "inside", None)
