"""The SHA-256 of each of a table's columns, taken by several processes: each goes through some columns, whole."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kcdcache import tables
from kcdcache.team import Columns, Team


def column_digests(
    team: Team, kinds: Mapping[str, Any], blocks: Callable[[Sequence[str]], Iterable[Columns]]
) -> dict[str, bytes]:
    """Return column -> SHA-256 of its bytes; `blocks` yields all rows of the columns it is asked for, in order."""
    names = list(kinds)
    mine = names[team.rank :: team.world]
    digest, found = tables.Digest({name: kinds[name] for name in mine}), np.zeros((len(names), 4), np.int64)
    for columns in blocks(mine) if mine else ():
        digest.add(columns)
    for name in mine:
        found[names.index(name)] = np.frombuffer(digest.of(name), np.int64)
    return {name: row.tobytes() for name, row in zip(names, team.total(found), strict=True)}
