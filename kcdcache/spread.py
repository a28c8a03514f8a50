"""A condensed set planned in shares, by several processes or with files for what memory does not hold; the same rows.

The samples are sorted into boxes: each gets an equal number of consecutive places of the order of all candidates, is
sorted by itself, and so knows the rank of each of its samples. Where a box ends is found exactly (`cuts`), so no box is
larger than the others however many scores are equal.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32, UInt64

from kcdcache import boxes, condense, ranking, rng, values
from kcdcache.boxes import Box, Boxes
from kcdcache.config import CondenseSettings
from kcdcache.cuts import Cuts, Sieve, find, numbered
from kcdcache.errors import SettingsError
from kcdcache.outline import Outline
from kcdcache.team import Columns
from kcdcache.values import Block, Source

NOBODY = 2**32 - 1
"""no partner; and no place, of a sample that is not kept"""
BYTES_A_SAMPLE, BYTES_OTHERWISE = 20, 48
"""memory of a share for each of its samples: ranked by value without classes, and otherwise"""
SPILLED_A_SAMPLE, SPILLED_OTHERWISE = 16, 32
"""bytes of files at the fullest moment"""
Labels = Int64[np.ndarray, " rows"] | None


class Before(NamedTuple):
    """The manifest that the values were last updated on, as far as one process has to know it."""

    digest: str
    rows: int
    own: Int64[np.ndarray, " some"]
    """kept samples among those of this process"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Places:
    """Where boxes begin in three orders: of all candidates, of the kept ones, of the dropped ones; each has an end."""

    ranked: Int64[np.ndarray, " ends"]
    kept: Int64[np.ndarray, " ends"]
    dropped: Int64[np.ndarray, " ends"]
    before: Int64[np.ndarray, "boxes classes"]
    """candidates of each class in earlier boxes"""
    quota: Int64[np.ndarray, " classes"]
    """how many of each class are kept; without classes there is one"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Shared(Outline):
    """A condensed set whose rows lie in the boxes of those processes that hold the samples."""

    bounds: Int64[np.ndarray, " ends"]
    """where each box's samples begin"""
    rows_of: dict[int, Box]
    """this process's boxes of kept samples, by number"""
    opened: dict[int, dict[str, np.ndarray]]
    """the box that is in use"""

    def columns(self, block: Block) -> dict[str, np.ndarray]:
        """Return the rows of the kept ones among some samples, ascending, as the columns of a manifest."""
        number = int(np.searchsorted(self.bounds, block.first, "right")) - 1
        first = int(self.bounds[number])
        if number not in self.opened:
            self.opened.clear()
            self.opened[number] = _by_sample(self.rows_of[number], first, int(self.bounds[number + 1]))
        some = slice(block.first - first, block.first - first + len(block.values.visits))
        held = {name: column[some] for name, column in self.opened[number].items()}
        inside = np.flatnonzero(held["place"] != NOBODY)
        place = held["place"][inside].astype(np.int64)
        partner = held["partner"][inside[place >= self.first]]
        return self.rows(block, inside, place, partner, held["rank"][inside] if "rank" in held else place)


def bounds_of(count: int, unit: int, number: int) -> Int64[np.ndarray, " ends"]:
    """Return where each of `number` boxes of consecutive samples begins, at a multiple of `unit`, and the last ends."""
    units = -(-count // unit)
    found: Int64[np.ndarray, " ends"] = np.minimum(unit * (units * np.arange(number + 1) // number), count)
    return found


def plan(
    source: Source,
    settings: CondenseSettings,
    *,
    count: int,
    stage: int,
    keep: float,
    previous: Before | None,
    excluded: Int64[np.ndarray, " excluded"],
    within: Boxes,
    bounds: Int64[np.ndarray, " ends"],
) -> Shared:
    """Return what `condense.plan` does, made by a team, each process going through the samples of its own boxes.

    `previous` has the samples of this process; `bounds` says which samples belong to which box.

    Raises:
        SettingsError, NonFiniteError: as for `condense.plan`; or there are too many samples to be ranked.
    """
    if count >= ranking.MOST_POSITIONS:
        raise SettingsError(
            f"{count} samples cannot be ranked, at most {ranking.MOST_POSITIONS - 1} can; select without ranks "
            "(kcdcache.selection)"
        )
    if settings.stratify and not source.labelled:
        raise SettingsError("stratify needs the label of every sample; give a values file with a 'label' column")
    log, classes = _recorded(source, settings, stage, previous, excluded, within, bounds)
    candidates = int(within.team.total(np.array([log.rows]))[0])
    size = condense.size_of(keep, count, candidates, count - len(excluded))
    ranked, places = _ranked(log, settings, candidates, classes, size, within)
    used = condense.K0[settings.k0](candidates - size, (previous.rows if previous else count) - size)
    if within.team.first:
        condense.tell(size, used, settings)
    pairs = min(size, used) if settings.augment_kept else 0
    kept, dropped = _split(ranked, places, pairs, within)
    names = ("index", "place", "partner", *(["rank"] if settings.stratify else []))
    found = _by_owner(kept, dropped, places, size - pairs, within, bounds, names)
    return Shared(
        kept=size, pairs=pairs, dropped=used, settings=settings, count=count, stage=stage, keep=keep,
        parent=previous.digest if previous else None, bounds=bounds, rows_of=found, opened={},
    )  # fmt: skip


def _recorded(
    source: Source, settings: CondenseSettings, stage: int, previous: Before | None,
    excluded: Int64[np.ndarray, " excluded"], within: Boxes, bounds: Int64[np.ndarray, " ends"],
) -> tuple[Box, int]:  # fmt: skip
    """Return what this process's candidates are ranked by, in order of the index, and the number of classes."""
    start, stop = int(bounds[within.own.start]), int(bounds[within.own.stop])
    competing = previous.own if previous is not None and settings.candidates == "current" else None
    log, highest = within.box(_kinds(settings), stop - start), 0
    for block in source.blocks(start, stop):
        index = _among(block, competing, excluded)
        columns = _keyed(block, index, settings, stage)
        if settings.stratify:
            assert block.labels is not None
            columns["label"] = labels = block.labels[index - block.first]
            if len(labels) and labels.min() < 0:
                raise SettingsError("stratify needs a label of 0 or more for every sample; found a negative one")
            highest = max(highest, int(labels.max(initial=0)))
        log.add(columns)
    return log, 1 + within.team.most(highest)


def _kinds(settings: CondenseSettings) -> dict[str, type[np.generic]]:
    plain: dict[str, type[np.generic]] = {"word": np.uint64}
    if settings.ranking == "random":
        plain = {"key": np.uint64, "index": np.uint32}
    return {**plain, "label": np.int64} if settings.stratify else plain


def _among(
    block: Block, competing: Int64[np.ndarray, " some"] | None, excluded: Int64[np.ndarray, " excluded"]
) -> Int64[np.ndarray, " candidates"]:
    """Return the candidates in a block."""
    stop = block.first + len(block.values.visits)
    index = np.arange(block.first, stop)
    if competing is not None:
        index = competing[slice(*np.searchsorted(competing, [block.first, stop]))]
    return np.setdiff1d(index, excluded, assume_unique=True) if len(excluded) else index


def _keyed(
    block: Block, index: Int64[np.ndarray, " candidates"], settings: CondenseSettings, stage: int
) -> dict[str, np.ndarray]:
    if settings.ranking == "random":
        return {"key": condense.random_keys(index, settings.condense_seed, rng.RANKING, stage), "index": index}
    scores = values.score(block.values, settings.cost_exponent, settings.unseen, block.first)
    words = np.empty(len(index), np.uint64)
    ranking.pack(words, scores[index - block.first], index)
    return {"word": words}


def _keys(columns: Columns) -> UInt64[np.ndarray, " rows"]:
    found: UInt64[np.ndarray, " rows"] = columns["key"] if "key" in columns else columns["word"] >> np.uint64(32)
    return found


def _ranked(
    log: Box, settings: CondenseSettings, candidates: int, classes: int, size: int, within: Boxes
) -> tuple[list[Box], Places]:
    """Return boxes of equal numbers of consecutive places, not yet sorted, and where kept and dropped ones begin."""
    ends = candidates * np.arange(within.number + 1) // within.number
    bits = 64 if settings.ranking == "random" else 32
    cuts = find(lambda: (_keys(columns) for columns in log.blocks()), bits, ends[1:-1], within.team)
    counts = np.diff(ends)[:, None]
    ranked = within.dealt(_kinds(settings), np.diff(ends), _sifted(log, cuts), _blocks(log.rows))
    log.drop()
    quota = np.array([size])
    if settings.stratify:
        counts = within.team.total(_class_counts(ranked, within, classes))
        quota = condense.quotas(counts.sum(axis=0), size)
    before = np.cumsum(counts, axis=0) - counts
    kept = np.append(0, np.cumsum(np.clip(quota - before, 0, counts).sum(axis=1)))
    return ranked, Places(ranked=ends, kept=kept, dropped=ends - kept, before=before, quota=quota)


def _sifted(log: Box, cuts: Cuts) -> Iterator[tuple[Int64[np.ndarray, " rows"], Columns]]:
    sieve = Sieve(cuts)
    for columns in log.blocks():
        yield sieve.sorted(_keys(columns)), columns


def _class_counts(ranked: list[Box], within: Boxes, classes: int) -> Int64[np.ndarray, "boxes classes"]:
    counts = np.zeros((within.number, classes), np.int64)
    for number, box in zip(within.own, ranked, strict=True):
        for columns in box.blocks():
            counts[number] += np.bincount(columns["label"], minlength=classes)
    return counts


def _split(ranked: list[Box], places: Places, pairs: int, within: Boxes) -> tuple[list[Box], list[Box]]:
    """Return this process's boxes of kept samples and of those dropped ones that are mixed in, both best first."""
    kept: list[Box] = []
    dropped: list[Box] = []
    for number, box in zip(within.own, ranked, strict=True):
        index, label = _ordered(box)
        box.drop()
        used = max(0, pairs - int(places.dropped[number]))
        columns = {"index": index}
        if label is None:
            end = int(places.kept[number + 1] - places.kept[number])
            chosen: tuple[Any, Any] = slice(end), slice(end, end + used)
        else:
            inside = numbered(label, places.before[number]) < places.quota[label]
            chosen = np.flatnonzero(inside), np.flatnonzero(~inside)[:used]
            columns["rank"] = (places.ranked[number] + np.arange(len(index))).astype(np.uint32)
        for boxed, some in ((kept, chosen[0]), (dropped, chosen[1])):
            boxed.append(within.box(dict.fromkeys(columns, np.uint32), len(index[some])))
            boxed[-1].add({name: column[some] for name, column in columns.items()})
    return kept, dropped


def _ordered(box: Box) -> tuple[UInt32[np.ndarray, " rows"], Labels]:
    """Return the samples of a box of consecutive places, best first, and their classes if they have any."""
    columns = box.whole()
    if "word" not in columns:
        order = np.lexsort((columns["index"], columns["key"]))
        return columns["index"][order], columns["label"][order] if "label" in columns else None
    words = columns["word"]
    if "label" in columns:
        order = np.argsort(words)  # no two are equal
        return words[order].astype(np.uint32), columns["label"][order]
    words.sort()
    return words.astype(np.uint32), None


def _mixed_in(dropped: list[Box], places: Places, first: int, within: Boxes) -> list[Box]:
    """Return for each of this process's boxes of kept samples what is mixed into those at places from `first` on."""

    def sent() -> Iterator[tuple[Int64[np.ndarray, " rows"], Columns]]:
        for number, box in zip(within.own, dropped, strict=True):
            pair = int(places.dropped[number])
            for columns in box.blocks():
                pair_of = np.arange(pair, pair + len(columns["index"]))
                yield np.searchsorted(places.kept[1:], first + pair_of, "right"), {**columns, "pair": pair_of}
                pair += len(pair_of)
            box.drop()

    kinds: dict[str, type[np.generic]] = {"index": np.uint32, "pair": np.uint32}
    rooms = np.diff(np.maximum(places.kept, first))
    return within.dealt(kinds, rooms, sent(), sum(_blocks(box.rows) for box in dropped))


def _partners(mixed_in: Box, room: int, place: int, first: int) -> UInt32[np.ndarray, " room"]:
    """Return what is mixed into each of `room` kept samples from a place on, NOBODY before place `first`."""
    found = np.full(room, NOBODY, np.uint32)
    for columns in mixed_in.blocks():
        found[columns["pair"].astype(np.int64) + (first - place)] = columns["index"]
    mixed_in.drop()
    return found


def _by_owner(
    kept: list[Box], dropped: list[Box], places: Places, first: int, within: Boxes, bounds: Int64[np.ndarray, " ends"],
    names: Iterable[str],
) -> dict[int, Box]:  # fmt: skip
    """Return this process's boxes of kept samples, now those of its own samples, each with its place and partner."""
    partners = _mixed_in(dropped, places, first, within)

    def sent() -> Iterator[tuple[Int64[np.ndarray, " rows"], Columns]]:
        for number, box, mixed_in in zip(within.own, kept, partners, strict=True):
            begin = int(places.kept[number])
            partner, done = _partners(mixed_in, box.rows, begin, first), 0
            for columns in box.blocks():
                some = slice(done, done := done + len(columns["index"]))
                place = begin + np.arange(some.start, some.stop)
                yield owner(columns), {**columns, "place": place, "partner": partner[some]}
            box.drop()

    def owner(columns: Columns) -> Int64[np.ndarray, " rows"]:
        return np.searchsorted(bounds[1:], columns["index"], "right")

    rooms = np.zeros(within.number, np.int64)
    for box in kept:
        for columns in box.blocks():
            rooms += np.bincount(owner(columns), minlength=within.number)
    count = sum(_blocks(box.rows) for box in kept)
    found = within.dealt(dict.fromkeys(names, np.uint32), within.team.total(rooms), sent(), count)
    return dict(zip(within.own, found, strict=True))


def _by_sample(box: Box, first: int, stop: int) -> dict[str, np.ndarray]:
    """Return the rows of a box as arrays over its samples; those that are not kept have the place NOBODY."""
    found: dict[str, np.ndarray] = {}
    for columns in box.blocks():
        row = columns["index"].astype(np.int64) - first
        for name, column in columns.items():
            if name != "index":
                found.setdefault(name, np.full(stop - first, NOBODY, np.uint32))[row] = column
    return found or {name: np.full(stop - first, NOBODY, np.uint32) for name in ("place", "partner")}


def _blocks(rows: int) -> int:
    return -(-rows // boxes.ROWS)
