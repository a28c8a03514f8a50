"""How results look on a terminal: one line per entry, numbers as people read them, nothing that could steer it."""

from collections.abc import Mapping
from typing import Any

from kcdcache import errors
from kcdcache.files import cloud

LABELS = {"K_1H": "K_1H (kept as they are)", "K_Aug": "K_Aug (kept and enriched)", "K_0": "K_0 (dropped)"}
"""entries whose names are the paper's -> what is shown"""


def printable(text: str) -> str:
    """Return `errors.printable` of text that names mirrored folders by their URLs."""
    return errors.printable(cloud.named(text))


def readable(result: Mapping[str, Any], indent: str = "") -> str:
    """Return a result for people: a table as it is, otherwise one line per entry, nested ones indented."""
    if "table" in result:
        last = f"files: {result['files']}" if "files" in result else str(result["note"])
        last += f"; report: {result['report']}" if result.get("report") not in (None, result.get("files")) else ""
        return "\n".join(map(printable, [*str(result["table"]).split("\n"), "", last]))
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{printable(str(key))}:", readable(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{printable(str(key))}:", *(f"{indent}  {_entry(item)}" for item in value)]
        else:
            lines.append(f"{indent}{printable(f'{LABELS.get(key, key)}: {_brief(key, value)}')}")
    return "\n".join(lines)


def _entry(item: Mapping[str, Any]) -> str:
    return printable("  ".join(f"{key}={_brief(key, value)}" for key, value in item.items()))


def _brief(key: str, value: Any) -> Any:
    """Return a number as people read it; --json has all digits, and so has what is meant to be given back."""
    return f"{value:.6g}" if isinstance(value, float) and key != "keep" else value
