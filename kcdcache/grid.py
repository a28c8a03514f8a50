"""Recipes written short: steps repeated for pairs of networks and for variants, spelled out one by one."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kcdcache.config import nearest
from kcdcache.errors import SettingsError

PLACE = re.compile(r"\{(\w+)\}")
"""where a pair's entry goes, as in model = "{student}" """
Entry = Mapping[str, Any]


def spelled_out(entries: Sequence[Entry], pairs: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Return the steps of a recipe, each once, in order; `entries` are its [[step]] tables, `pairs` its [[pair]] ones.

    All steps are repeated for every pair, whose entries replace {name} in their texts; an entry that is a list stands
    for a pair with each of its items. Steps that come out equal (a teacher that two pairs share) are one.
    [[step.variant]] tables repeat their step with other settings: their name is appended to the step's with '-', their
    title to its title.

    Raises:
        SettingsError: {name} is no entry of a pair, a variant has no name, or two different steps have the same name.
    """
    found: dict[str, dict[str, Any]] = {}
    for pair in _single(pairs) or [{}]:
        for entry in entries:
            for variant in _variants(entry, source):
                step = _filled(variant, pair, bool(pairs), source)
                name = str(step.get("name"))
                if name in found and (not pairs or found[name] != step):
                    raise SettingsError(f"{source}: two steps are called '{name}'; names differ by {{...}} of a pair")
                found[name] = step
    return list(found.values())


def _single(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the pairs with every list's items one by one, the last entry changing fastest."""
    listed = [[item if isinstance(item, list) else [item] for item in pair.values()] for pair in pairs]
    return [
        dict(zip(pair, chosen, strict=True))
        for pair, items in zip(pairs, listed, strict=True)
        for chosen in itertools.product(*items)
    ]


def _variants(entry: Entry, source: str) -> Iterator[dict[str, Any]]:
    plain = {key: value for key, value in entry.items() if key != "variant"}
    if "variant" not in entry:
        yield plain
        return
    for variant in entry["variant"]:
        if not isinstance(variant, Mapping) or "name" not in variant:
            raise SettingsError(
                f"{source}, step '{entry.get('name')}': variants are tables headed [[step.variant]] with a name"
            )
        title = " ".join(part for part in (entry.get("title"), variant.get("title", variant["name"])) if part)
        yield {**plain, **variant, "name": f"{entry.get('name')}-{variant['name']}", "title": title}


def _filled(value: Any, pair: Mapping[str, str], paired: bool, source: str) -> Any:
    """Return a value with {name} replaced by the pair's entry, in all texts inside it."""
    if isinstance(value, str) and paired:
        return PLACE.sub(lambda match: _of_pair(match[1], pair, source), value)
    if isinstance(value, Mapping):
        return {key: _filled(inner, pair, paired, source) for key, inner in value.items()}
    return [_filled(inner, pair, paired, source) for inner in value] if isinstance(value, list) else value


def _of_pair(name: str, pair: Mapping[str, str], source: str) -> str:
    if name not in pair:
        raise SettingsError(f"{source}: {{{name}}} is no entry of every [[pair]]; {nearest(name, list(pair))}")
    return str(pair[name])
