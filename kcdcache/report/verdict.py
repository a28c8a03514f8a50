"""The verdict of a report: each condensed row against KD and against a random control, in words and numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kcdcache.report import tables
from kcdcache.report.load import Loaded, Run
from kcdcache.report.tables import Key

EQUAL_SAMPLES = 0.02
"""largest relative difference in student samples between a condensed row and its random control"""


class Verdict(NamedTuple):
    """Test accuracy of a row minus that of another in percentage points, and the ratio of their student samples."""

    row: str
    reference: str
    condensed: bool
    """whether the row trained on condensed sets ranked by value"""
    n: int
    """pairs of runs with the same seed"""
    mean: float
    low: float | None
    """95 % confidence interval (Student's t); None for one pair"""
    high: float | None
    share: float
    """student samples of the row / those of the reference"""

    @property
    def outcome(self) -> str:
        """Wins or loses if the interval excludes 0; else the rows cannot be told apart."""
        if self.low is None or self.high is None:
            return "one pair only, so nothing can be said"
        if self.low == self.high == 0:
            return "equal in every pair"
        return "wins" if self.low > 0 else "loses" if self.high < 0 else "cannot be told apart"

    @property
    def text(self) -> str:
        """The verdict in one sentence.

        >>> Verdict("KCD", "KD", True, 3, -0.46, -1.52, 0.59, 0.87).text
        'KCD: -0.46 points [-1.52, +0.59] against KD, at 87 % of its samples; n = 3: cannot be told apart'
        """
        interval = "" if self.low is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return (
            f"{self.row}: {self.mean:+.2f} points{interval} against {self.reference}, "
            f"at {100 * self.share:.0f} % of its samples; n = {self.n}: {self.outcome}"
        )


def every(loaded: Loaded, asked: str | None = None, across: bool = False) -> list[Verdict]:
    """Return each row against its reference, and each condensed row also against its random controls.

    For `asked` and `across` see `tables.references`.
    """
    rows = loaded.rows()
    found = []
    for key, reference in tables.references(loaded, asked, across).items():
        against = dict.fromkeys([reference, *_controls(key, rows)])
        found += [one for other in against for one in _verdict(loaded, key, other, across)]
    return found


def chosen(found: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts on condensed rows, or all if there are none."""
    return [one for one in found if one.condensed] or list(found)


def _condensed(run: Run) -> bool:
    return not _random(run) and any(len(kept) < kept.count for kept in run.sets)


def _random(run: Run) -> bool:
    """Return whether a run trained on samples drawn at random."""
    settings = run.record.settings
    return settings.get("ranking") == "random" or str(settings.get("sampling")).startswith("random")


def _controls(key: Key, rows: Mapping[Key, Sequence[Run]]) -> Iterator[Key]:
    """Yield the rows of random samples with a condensed row's grid, network, knowledge and number of samples."""
    run, samples = rows[key][0], tables.mean(rows[key], "student_samples")
    for other, runs in rows.items():
        alike = runs[0].summary.model == run.summary.model and tables.knowledge_of(runs[0]) == tables.knowledge_of(run)
        if _condensed(run) and other[0] == key[0] and alike and _random(runs[0]):
            own = tables.mean(runs, "student_samples")
            if samples and own and abs(samples / own - 1) <= EQUAL_SAMPLES:
                yield other


def _verdict(loaded: Loaded, key: Key, other: Key, across: bool) -> Iterator[Verdict]:
    names, rows = tables.labels(loaded), loaded.rows()
    ours, theirs = rows[key], rows[other]
    measures = {row["measure"]: row for row in tables.compared(ours, theirs, across)}
    share = _share(ours, theirs)
    if (row := measures.get("accuracy last")) is not None and share is not None:
        numbers = {name: row[name] for name in ("n", "mean", "low", "high")}
        yield Verdict(names[key], names[other], _condensed(ours[0]), share=share, **numbers)


def _share(ours: Sequence[Run], theirs: Sequence[Run]) -> float | None:
    """Return the ratio of student samples over common seeds."""
    common = {run.seed for run in ours} & {run.seed for run in theirs}
    own, other = (
        tables.mean([run for run in some if run.seed in common], "student_samples") for some in (ours, theirs)
    )
    return own / other if own is not None and other else None
