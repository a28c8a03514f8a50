"""What a manifest says beside its rows: facts, the totals of the rows, and what people are told of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, NamedTuple

import numpy as np

from kcdcache.errors import MismatchError
from kcdcache.rules import KEPT, MIXED
from kcdcache.schedule import kept_count

FORMAT_VERSION = 0
_TYPE_NAMES: dict[type, str] = {NoneType: "None", tuple: "tuple of int"}
FACTS: dict[str, tuple[type, ...]] = {
    "knowledge_id": (str,), "count": (int,), "stage": (int,), "keep": (float,), "dropped": (int,), "rule": (dict,),
    "parent": (str, NoneType), "values": (str, NoneType), "class_counts": (tuple,), "data_digest": (str, NoneType),
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Facts:
    """What a manifest says beside its rows.

    Raises:
        MismatchError: a fact is of another type than it should be.
    """

    knowledge_id: str
    """the knowledge it was made for"""
    count: int
    """number of samples N in the whole training split"""
    stage: int
    """stage that trains on it"""
    keep: float
    """share of N kept"""
    dropped: int = 0
    """size of K_0, the dropped points the rule names, used as partners or not"""
    rule: dict[str, Any] = field(default_factory=dict)
    """settings of the condensation"""
    parent: str | None = None
    """digest of the previous stage's manifest"""
    values: str | None = None
    """fingerprint of the values it was ranked by"""
    class_counts: tuple[int, ...] = ()
    """kept samples per class, empty where labels were not known"""
    data_digest: str | None = None
    """digest of the training split, which lets a transfer to another teacher check its data"""

    def __post_init__(self) -> None:
        if isinstance(self.keep, int):
            object.__setattr__(self, "keep", float(self.keep))  # 1 and 1.0 must give one digest
        _require_types(self)

    def document_of(self, rows: int) -> dict[str, Any]:
        """Return them as JSON values, for a manifest of so many rows; without the digest."""
        facts = {name: getattr(self, name) for name in FACTS}
        changed = {"class_counts": list(self.class_counts), "rows": rows}
        return {"format_version": FORMAT_VERSION, **facts, **changed}

    def require_fit(self, rows: int, mixed: int) -> None:
        """Do nothing if they fit a manifest of so many rows, so many of them mixed.

        Raises:
            MismatchError: one does not; names it.
        """
        _require_facts(self, rows, mixed)


class Totals(NamedTuple):
    """What a summary needs of the rows."""

    rows: int = 0
    mixed: int = 0
    unseen: int = 0
    """rows of samples that were never visited"""
    epsilon: tuple[float, float] | None = None
    """smallest and largest share of a partner; None where nothing is mixed"""

    def plus(self, columns: Mapping[str, np.ndarray]) -> "Totals":
        """Return the totals of these rows and more."""
        shares = columns["epsilon"][columns["mixed"]]
        ends = [] if self.epsilon is None else [*self.epsilon]
        ends += [float(shares.min()), float(shares.max())] if len(shares) else []
        return Totals(
            self.rows + len(columns["index"]), self.mixed + len(shares),
            self.unseen + int((columns["visits"] == 0).sum()), (min(ends), max(ends)) if ends else None,
        )  # fmt: skip


def told(facts: Facts, totals: Totals, digest: str) -> dict[str, Any]:
    """Return the same of a manifest that is not in memory."""
    counts = facts.class_counts
    return {
        "stage": facts.stage, "samples": facts.count, "kept": totals.rows, "keep": facts.keep,
        KEPT: totals.rows - totals.mixed, MIXED: totals.mixed, "K_0": facts.dropped,
        "epsilon": None if totals.epsilon is None else [*totals.epsilon], "unseen": totals.unseen,
        "classes": len(counts), "class_min": min(counts, default=None), "class_max": max(counts, default=None),
        "rule": dict(facts.rule), "knowledge_id": facts.knowledge_id, "parent": facts.parent,
        "values": facts.values, "digest": digest,
    }  # fmt: skip


def _require_types(facts: Facts) -> None:
    for name, kinds in FACTS.items():
        found = getattr(facts, name)
        parts = found if isinstance(found, tuple) else ()
        if not isinstance(found, kinds) or not all(isinstance(part, int) for part in parts):
            wanted = " or ".join(_TYPE_NAMES.get(kind, kind.__name__) for kind in kinds)
            raise MismatchError(f"manifest field '{name}': expected {wanted}, found {found!r}")


def _require_facts(facts: Facts, rows: int, mixed: int) -> None:
    counts = facts.class_counts
    for name, expected, good in (
        ("count", f"at least its {rows} rows", facts.count >= rows),
        ("stage", "0 or more", facts.stage >= 0),
        ("keep", "a share in (0, 1]", 0 < facts.keep <= 1),
        ("keep", f"a share of {facts.count} that its {rows} rows do not exceed", _fits_share(facts, rows)),
        ("dropped", "at least the number of mixed rows", facts.dropped >= mixed),
        ("dropped", "no more than are not kept", facts.dropped <= facts.count - rows),
        ("class_counts", "0 or more of each class", all(number >= 0 for number in counts)),
        ("class_counts", f"{rows} in all, or nothing", not counts or sum(counts) == rows),
    ):
        if not good:
            raise MismatchError(f"manifest field '{name}': expected {expected}, found {getattr(facts, name)}")


def _fits_share(facts: Facts, rows: int) -> bool:
    """Fewer rows than the share are fine: where samples were skipped, fewer are left than it allows."""
    return not 0 < facts.keep <= 1 or rows <= kept_count(facts.keep, facts.count)
