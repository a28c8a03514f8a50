"""TODO."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called with what is being done, how much is done, how much there is, and a remark."""


def silent(what: str, done: int, total: int, remark: str) -> None:
    """Report no progress."""
