"""How long work tells how far it is: a function that it is given, and calls now and then."""

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""called with what is being done, how much is done, how much there is, and a remark"""


def silent(what: str, done: int, total: int, remark: str) -> None:
    """Report no progress."""
