"""The dataset card of an exported condensed set: README.md with the front matter the Hugging Face hub reads."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kcdcache.exported import IMAGES, MANIFEST, Content
from kcdcache.identity import Knowledge

SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)


def card(
    content: Content, knowledge: Knowledge, summary: Mapping[str, Any], command: str, corruption: Mapping[str, Any]
) -> bytes:
    """Return README.md: the same bytes for the same set; no clock time, host or version in it.

    `corruption` is what its store tells of the labels, empty for nothing.
    """
    text = _text(content, knowledge, summary, command)
    return "\n".join([*_front(content, int(summary["kept"])), "", *text, *_corrupted(corruption), ""]).encode()


def _front(content: Content, rows: int) -> Sequence[str]:
    files = [("train", MANIFEST)]
    if content.images is not None:
        files = [("train", f"{IMAGES}/train-*.parquet"), ("test", f"{IMAGES}/test-*.parquet")]
    return [
        "---",
        f"license: {json.dumps(content.licence)}",  # JSON texts are YAML texts
        "task_categories:",
        "- image-classification",
        "tags:",
        "- knowledge-distillation",
        "- dataset-condensation",
        "- kcdcache",
        "size_categories:",
        f"- {_size(rows)}",
        "configs:",
        "- config_name: default",
        "  data_files:",
        *(line for split, path in files for line in (f"  - split: {split}", f"    path: {path}")),
        "---",
    ]


def _text(content: Content, knowledge: Knowledge, summary: Mapping[str, Any], command: str) -> Sequence[str]:
    data, teacher, views = knowledge.data, knowledge.teacher, knowledge.views
    layout = ", ".join(f"{entry['name']} ({entry['encoding']})" for entry in content.layout["fields"])
    return [
        "# Condensed knowledge for distillation",
        "",
        f"{summary['kept']:,} of the {data.count:,} training samples of a data set with {len(data.classes)} classes,",
        f"with the outputs of one teacher on {content.views} augmented views of each: {layout}. "
        f"{summary['K_1H']:,} samples are kept",
        f"as they are, into {summary['K_Aug']:,} a dropped sample is mixed. Made by kcdcache with Knowledge",
        "Condensation Distillation (Li et al., ECCV 2022, arXiv 2207.05409).",
        "",
        "## Use",
        "",
        "Fetch the whole folder as plain files (`hf download REPO --repo-type dataset --local-dir DIR`; links as in",
        "the hub's cache are not read), then train any student, without the teacher and its store:",
        "",
        "```sh",
        "kcdcache verify DIR",
        command,
        "```",
        "",
        "```python",
        "from kcdcache import condensed",
        "",
        'opened = condensed.open("DIR")',
        "opened.manifest, opened.knowledge  # which samples; the teacher's outputs by index of the whole data set",
        "```",
        "",
        *_images(content),
        *_baked(content),
        "",
        "## Made from",
        "",
        f"- knowledge: `{content.knowledge_id}`",
        f"- manifest: `{content.manifest}` (stage {summary['stage']}, keep {summary['keep']:g})",
        f"- teacher: {_quoted(teacher.architecture)}, weights `{teacher.weights}`, {_quoted(teacher.precision)}",
        f"- data: `{data.digest}` (digest of images, labels and order)",
        f"- views: {_quoted(views.rule)}, padding {views.padding}, size {views.size[0]}x{views.size[1]}, "
        f"seed {views.seed}",
        "",
        f"`{MANIFEST}` holds the samples' `index` in the original training split, their part, partner and share;",
        "`samples.parquet` maps every index to its row in `store`; `condensed.json` names every file by SHA-256.",
    ]


def _corrupted(corruption: Mapping[str, Any]) -> Sequence[str]:
    """Return a warning of labels that were made wrong, and of classes thinned out, on purpose."""
    if not (options := corruption.get("corruption")):
        return []
    told = ", ".join(f"{name} {value}" for name, value in sorted(options.items()))
    return [
        "",
        "## Corrupted on purpose",
        "",
        f"The training split was changed before the teacher was asked ({_quoted(told)}):",
        f"{corruption.get('mislabelled', 0):,} of all its samples have a wrong label; do not take them for true.",
    ]


def _images(content: Content) -> Sequence[str]:
    if content.images is None:
        return ["The images are not part of this set: give the original data set as `--data`; it is compared."]
    return [
        f"The images are in `{IMAGES}`: kept samples and partners with their `index` in the original training split,",
        "and the whole test split. With `--data condensed:DIR` students train and are tested without the original",
        "data.",
    ]


def _baked(content: Content) -> Sequence[str]:
    if content.baked is None:
        return []
    return [
        f"Targets of mixed samples are baked: they hold at temperature {content.baked.temperature:g} only, mixed by",
        f"{content.baked.target}; training at another temperature is refused.",
    ]


def _quoted(text: str) -> str:
    """Return text from elsewhere as Markdown shows it: nothing in it can end the line or make markup."""
    return f"`{json.dumps(text)[1:-1].replace('`', '')}`"


def _size(rows: int) -> str:
    for low, high in zip((0, *SIZES), SIZES, strict=False):
        if rows < high:
            return f"n<{_short(high)}" if not low else f"{_short(low)}<n<{_short(high)}"
    return f"n>{_short(SIZES[-1])}"


def _short(number: int) -> str:
    return f"{number // 10**6}M" if number >= 10**6 else f"{number // 10**3}K"
