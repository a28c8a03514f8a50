"""Progress of long work, reported to a function that it is given."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""called with the name of the work, how much is done, the total, and a remark"""


def silent(what: str, done: int, total: int, remark: str) -> None:
    """Report no progress."""
