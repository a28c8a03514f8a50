"""What commands are given, made ready: the views that suit the data, teachers, reports of progress."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast, get_args

from kcdcache.data.datasets import Dataset
from kcdcache.errors import MismatchError
from kcdcache.files.records import logged
from kcdcache.networks.input_transform import resolve_device, use_threads
from kcdcache.progress import Progress
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import Precision, TeacherSettings
from kcdcache.store.identity import Knowledge
from kcdcache.teacher import teacher


def usual_views(given: Collection[str], data: Dataset) -> dict[str, Any]:
    """Return the view settings that suit the data, where the user named none."""
    return {} if "augment" in given else {key: value for key, value in data.usual_views.items() if key not in given}


def load_teacher(
    named: TeacherSettings, data: Dataset, precision: Precision, device: str, threads: int | None
) -> teacher.Teacher:
    """Return the teacher that settings name, for this data.

    Raises:
        KcdcacheError: as for `teacher.load`.
    """
    assert named.teacher is not None
    use_threads(threads)
    return teacher.load(
        named.teacher,
        weights_path=named.weights,
        classes=data.classes,
        mean=named.teacher_mean or data.mean,
        std=named.teacher_std or data.std,
        size=named.teacher_size,
        device=resolve_device(device),
        precision=precision,
        channels=len(data.mean),
    )


def precision_of(knowledge: Knowledge, path: Path) -> Precision:
    """Return the arithmetic of the teacher that the store at `path` was made with.

    Raises:
        MismatchError: its logits were imported, so that no teacher here can give them again.
    """
    made_by = knowledge.teacher
    if made_by.architecture == "imported" or made_by.precision not in get_args(Precision):
        raise MismatchError(
            f"the logits in {path} were imported from elsewhere ({made_by.precision}): no teacher here can give them "
            "again; use a store that `kcdcache precompute --teacher` made"
        )
    return cast(Precision, made_by.precision)


def paced(progress: Progress, out: Path) -> Progress:
    """Return a report of progress that tells images per second with every epoch of the run in `out`."""

    def told(what: str, done: int, total: int, remark: str) -> None:
        rate = logged(RunFolder(path=out).timing) if what == "train" else None
        progress(what, done, total, remark if rate is None else f"{remark}, {rate} images/s")

    return told
