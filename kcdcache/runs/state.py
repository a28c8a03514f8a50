"""A run's folder: settings, environment, checkpoints, manifests, metrics and summary."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError
from torch import Tensor

from kcdcache import errors
from kcdcache.condensation import manifest
from kcdcache.condensation.compare import SetCounts
from kcdcache.condensation.manifest import Manifest
from kcdcache.datasets.label_noise import NOISE_SEED
from kcdcache.environment import changed, check_environment, environment
from kcdcache.files import atomic, records, run_files
from kcdcache.files.records import Rate, Sealed, Sha256, Sparse, canonical_json, read_sealed, readable_json, sealed_json
from kcdcache.networks.input_transform import resolve_device
from kcdcache.networks.weights import MOST_HEADER_BYTES
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import MachineSettings

logger = logging.getLogger(__name__)

RECORD_KEY = "kcdcache"
VOLATILE = ("seconds", "images_per_second", "store_teacher_forwards")
"""entries of a summary that depend on the clock, or change when the store grows"""


class Environment(Sparse):
    """Environment of a run or a part of it, see `environment.environment`."""

    python: str
    versions: dict[str, str]
    device: str
    device_name: str
    threads: int
    processes: int = 1
    """absent in records of earlier versions, which had one"""
    git_commit: str | None
    command: str


class Inputs(Sparse):
    """A run's inputs, those that are data by digest; a `fit` has only `data` and `test`."""

    test: str
    data: str | None = None
    knowledge_id: str | None = None
    views: int | None = None
    encodings: dict[str, str] | None = None
    teacher_batch: int | None = None
    given: str | None = None
    """digest of the manifest that the run started from, if any"""
    skipped: list[int] | None = None


class RunRecord(Sparse):
    """Content of run.json."""

    settings: dict[str, Any]
    """settings that affect results"""
    inputs: Inputs
    environment: Environment
    changes: list[Environment]

    @property
    def latest(self) -> Environment:
        """The last environment."""
        return [self.environment, *self.changes][-1]


class MetricsRow(Sparse):
    """A line of metrics.jsonl for one epoch. Losses are in nats, accuracies and agreement in [0, 1]."""

    epoch: int
    """from 0"""
    learning_rate: float
    samples: int
    """number of samples forwarded in this epoch"""
    samples_so_far: int
    loss: float
    train_accuracy: float
    agreement: float | None = None
    """fraction of samples with the same prediction by student and teacher"""
    test_accuracy: float | None = None
    """unset, like the next two, if the epoch was not evaluated"""
    test_loss: float | None = None
    test_calibration_error: float | None = None
    ema_test_accuracy: float | None = None
    """of the averaged weights, like the next two; unset without --ema-decay"""
    ema_test_loss: float | None = None
    ema_test_calibration_error: float | None = None
    terms: dict[str, float] | None = None
    """mean of each term of the loss with its weight; unset without --log, and for the rest of an epoch that began so"""
    view: int
    stage: int | None = None
    """unset, like all below, in a `fit`"""
    kept: int | None = None
    mixed: int | None = None
    rows_read: int | None = None
    """from the store, by all processes"""
    bytes_read: int | None = None
    rows_read_by_each: list[int] | None = None
    """per process, if there are several"""
    bytes_read_by_each: list[int] | None = None


class CorruptionRecord(Sparse):
    """Corruption of the training split, see `label_noise.Corruption`."""

    noise: float | None = None
    noise_seed: int = NOISE_SEED
    redraw: bool = True
    gamma: float | None = None
    n_max: int | None = None
    n_min: int | None = None


class Outcome(Sparse):
    """The part of a summary computed from metrics; accuracies are on the test split, which also selects the best."""

    accuracy_last: float
    accuracy_best: float
    best_epoch: int
    """from 0, as in metrics.jsonl"""
    accuracy_ema: float | None = None
    """of the averaged weights after the last epoch; unset without --ema-decay"""
    calibration_error: float
    relative_cost: float
    """measured C of Eq. 16: student_samples / (count x epochs)"""
    student_samples: int
    epochs: int
    count: int
    """N of the training split"""


class Summary(Outcome):
    """Content of summary.json; entries that do not apply are unset."""

    kind: Literal["fit", "train"]
    model: str
    teacher_forwards: int
    """for mixed samples of this run"""
    seconds: float
    images_per_second: Rate | None = None

    finished: bool | None = None
    """true for `train`; unset for `fit`, like all below to `condensed_set`"""
    method: str | None = None
    knowledge_id: str | None = None
    store_teacher_forwards: int | None = None
    rows_read: int | None = None
    bytes_read: int | None = None
    kept: int | None = None
    condensed_set: Annotated[str, Field(pattern=r"^stages/[0-9]+/manifest\.parquet$")] | None = None

    corruption: CorruptionRecord | None = None
    mislabelled: int | None = None
    true_labels: str | None = None
    class_sizes: list[int] | None = None
    teacher_data: Literal["same", "other"] | None = None

    agreement_train: float | None = None
    """see `evaluation.fidelity`, also for all below"""
    agreement_test: float | None = None
    accuracy_train: float | None = None
    accuracy_true: float | None = None
    accuracy_right: float | None = None
    memorised: float | None = None
    recovered: float | None = None
    accuracy_frequent: float | None = None
    accuracy_rare: float | None = None
    teacher_accuracy: float | None = None
    teacher_accuracy_train: float | None = None
    teacher_accuracy_true: float | None = None
    teacher_accuracy_right: float | None = None
    teacher_memorised: float | None = None
    teacher_recovered: float | None = None
    sets: list[SetCounts] | None = None


class Checkpoint(Sparse):
    """Content of a checkpoint besides tensors."""

    epoch: int
    """finished ones"""
    step: int
    """finished ones of the current epoch"""
    samples: int
    rows: list[MetricsRow]
    optimizer: dict[str, Any] | None = None
    """state other than tensors; unset by older versions"""
    run: Sha256 | None = Field(default=None, exclude=True)
    """id of the run, only in the file"""


class Pointer(Sealed):
    """Content of checkpoint/latest.json: the current checkpoint."""

    file: Annotated[str, Field(pattern=r"^[0-9a-f]{16}\.safetensors$")]
    sha256: Sha256


@contextmanager
def session(
    folder: RunFolder,
    settings: Mapping[str, Any],
    inputs: Inputs,
    machine: MachineSettings,
    processes: int,
) -> Iterator[torch.device]:
    """Hold a run's folder for training: lock it, begin or continue its record, set its thread count; yield the device.

    Raises:
        LockedError: another process trains here.
        SettingsError, MismatchError: the folder holds another run, or the run began in another environment; not if
            that run ended before its first checkpoint, which is then begun anew.
    """
    device = resolve_device(machine.device)
    atomic.require_no_links(folder.path)
    with atomic.locked(folder.lock):
        record = start(folder, settings, inputs)
        _remove_other_checkpoints(folder)  # left by a kill between saving a checkpoint and removing the old one
        before = torch.get_num_threads()
        wanted = machine.threads or (record.latest.threads if record else before)
        torch.set_num_threads(wanted)
        try:
            now = Environment(**environment(device, wanted, processes))
            began = record or RunRecord(settings=dict(settings), inputs=inputs, environment=now, changes=[])
            _go_on(folder, began, now, machine.allow_env_change)
            yield device
        finally:
            torch.set_num_threads(before)


def _go_on(folder: RunFolder, record: RunRecord, now: Environment, allow_change: bool) -> None:
    """Write the record of a new run, or of one that continues in another environment, if allowed."""
    known, here = record.latest.document(), now.document()
    if changed(known, here) and not has_begun(folder):
        write_record(folder, record.model_copy(update={"environment": now, "changes": []}))
    elif changed(known, here):
        check_environment(known, here, allow_change)
        write_record(folder, record.model_copy(update={"changes": [*record.changes, now]}))
    elif not folder.settings.exists():
        write_record(folder, record)


def start(folder: RunFolder, settings: Mapping[str, Any], inputs: Inputs) -> RunRecord | None:
    """Return the record of the run in this folder, or None if the folder is empty.

    Another run that has no checkpoint yet (it was refused, diverged, or was killed) is deleted, and None returned.

    Raises:
        SettingsError: the folder holds a run with other settings; names the first.
        MismatchError: the folder holds a run with other inputs, or something else; names the first.
    """
    atomic.remove_leftovers(folder.path)
    if not folder.settings.exists():
        if others := [p.name for p in folder.path.iterdir() if not p.name.startswith(folder.lock.name)]:
            raise errors.MismatchError(
                f"{folder.path} holds {others[0]} but no run.json; give an empty or new folder as --out"
            )
        return None
    record = read_record(folder)
    asked = to_jsonable_python(settings), inputs.document()
    if (record.settings, record.inputs.document()) != asked and not has_begun(folder):
        logger.info("%s holds another run, which ended before its first checkpoint: it is started again", folder.path)
        _forget(folder)
        return None
    if difference := errors.first_difference(record.settings, asked[0]):
        name, was, now = difference
        raise errors.SettingsError(
            f"{folder.path} holds a run with {name} = {was!r}, requested now: {now!r}; "
            "give the same settings to continue it, or another --out"
        )
    names = (f"the run in {folder.path}", "what was given now")
    errors.require_same(record.inputs.document(), inputs.document(), names, "use another --out")
    return record


def has_begun(folder: RunFolder) -> bool:
    """Return whether a run has a checkpoint, or anything that is written after the first one."""
    later = (folder.pointer, folder.metrics, folder.summary, folder.values, folder.stage_values(0))
    return any(path.exists() for path in later) or any(folder.manifests())


def begun_record(folder: RunFolder) -> RunRecord | None:
    """Return the record of a run that goes on from a checkpoint, or None: what is given now decides."""
    return read_record(folder) if folder.settings.exists() and has_begun(folder) else None


def _forget(folder: RunFolder) -> None:
    """Delete the files of a run without checkpoint, the record last; files of others stay."""
    mixes = [file for made in folder.path.glob("stages/*/*.requery") for file in made.rglob("*") if file.is_file()]
    files = folder.path / run_files.FILE
    for file in (*mixes, *folder.manifests().values(), folder.given, folder.timing, files, folder.settings):
        atomic.remove(file)
    for place, _, _ in os.walk(folder.path / "stages", topdown=False):
        with suppress(OSError):  # a file of others is in it
            os.rmdir(place)


def outcome(rows: Sequence[MetricsRow], count: int, epochs: int) -> Outcome:
    """Compute the outcome of a finished run from its metrics and the number of samples and epochs."""
    last = rows[-1]
    measured = {row.test_accuracy: row.epoch for row in reversed(rows) if row.test_accuracy is not None}  # the first
    assert last.test_accuracy is not None
    assert last.test_calibration_error is not None
    averaged: dict[str, Any] = {} if last.ema_test_accuracy is None else {"accuracy_ema": last.ema_test_accuracy}
    return Outcome(
        **averaged,
        accuracy_last=last.test_accuracy,
        accuracy_best=max(measured),
        best_epoch=measured[max(measured)],
        calibration_error=last.test_calibration_error,
        relative_cost=last.samples_so_far / (count * epochs),
        student_samples=last.samples_so_far,
        epochs=epochs,
        count=count,
    )


def write_record(folder: RunFolder, record: RunRecord) -> None:
    """Write run.json."""
    atomic.write_atomic(folder.settings, sealed_json(record.document(), readable_json))


def read_record(folder: RunFolder) -> RunRecord:
    """Read run.json; raises NotFoundError if it is missing, CorruptionError if it is damaged or edited."""
    return read_sealed(folder.settings, RunRecord, readable_json)


def write_manifest(folder: RunFolder, path: Path, made: Manifest) -> None:
    """Write a manifest of a run and record its rows and digests; raises LockedError if there is another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not folder.is_complete(path):
        atomic.remove(path)  # left by a kill before it was recorded
    with run_files.writing(folder.path, {folder.name_of(path): run_files.Facts(len(made), made.digest)}):
        manifest.write(path, made)


def save_checkpoint(folder: RunFolder, tensors: Mapping[str, Tensor], record: Checkpoint) -> None:
    """Replace the checkpoint of a run; a kill at any time leaves the old or the new one."""
    folder.checkpoints.mkdir(exist_ok=True)
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = canonical_json({**record.document(), "run": run_files.run_id(folder.path)})
    data = safetensors.torch.save(owned, metadata={RECORD_KEY: content.decode()})
    digest = atomic.sha256_bytes(data)
    name = f"{digest[:16]}.safetensors"
    atomic.write_atomic(folder.checkpoints / name, data)
    atomic.write_atomic(folder.pointer, sealed_json(Pointer(file=name, sha256=digest).document()))
    _remove_other_checkpoints(folder)


def load_checkpoint(folder: RunFolder) -> tuple[dict[str, Tensor], Checkpoint] | None:
    """Return the tensors and the record of a run's checkpoint, or None if there is none.

    Raises:
        CorruptionError: the file is missing or damaged.
        MismatchError: it belongs to another run.
        UnsafeError: its header is too large.
    """
    if not folder.pointer.exists():
        return None
    pointer = read_sealed(folder.pointer, Pointer)
    path = folder.checkpoints / pointer.file
    data = atomic.read_bytes(path) if path.exists() else b""
    if atomic.sha256_bytes(data) != pointer.sha256:
        raise errors.CorruptionError(
            f"checkpoint {path} is damaged: its SHA-256 is not the one in {folder.pointer}; start a new run"
        )
    tensors, record = _parse_checkpoint(data, path)
    if record.run != (own := run_files.run_id(folder.path)):
        raise errors.MismatchError(
            f"checkpoint {path} is of run {record.run}, {folder.settings} of {own}; put the run's own back"
        )
    return tensors, record


def write_metrics(folder: RunFolder, rows: Sequence[MetricsRow]) -> None:
    """Write metrics.jsonl."""
    atomic.write_atomic(folder.metrics, metrics_lines(rows))


def metrics_lines(rows: Sequence[MetricsRow]) -> bytes:
    """Return the content of metrics.jsonl."""
    return b"".join(canonical_json(row.document()) + b"\n" for row in rows)


def add_timing(folder: RunFolder, row: Mapping[str, Any]) -> None:
    """Append a line to timing.jsonl, which is separate from the metrics since it differs between equal runs."""
    atomic.append(folder.timing, canonical_json(row) + b"\n")


def write_summary(folder: RunFolder, summary: Summary) -> None:
    """Write summary.json and record the digest of its lasting part."""
    with run_files.writing(folder.path, {folder.summary.name: _lasting(summary)}):
        atomic.write_atomic(folder.summary, sealed_json(summary.document(), readable_json))


def read_summary(path: Path) -> Summary:
    """Read the summary of a finished run.

    Raises:
        NotFoundError: there is no run.
        UnfinishedError: the run is not finished.
        CorruptionError: the summary is damaged.
        MismatchError: it belongs to another run.
    """
    folder = RunFolder(path=path)
    if folder.summary.exists():
        summary = read_sealed(folder.summary, Summary, readable_json)
        run_files.require(folder.summary, _lasting(summary))
        return summary
    if folder.settings.exists():
        raise errors.UnfinishedError(f"the run in {path} is not finished; run its command again to continue it")
    raise errors.NotFoundError(f"no run at {path}")


def read_metrics(path: Path) -> list[MetricsRow]:
    """Read metrics.jsonl, one row per epoch; raises NotFoundError if it is missing, CorruptionError for a bad line."""
    file = RunFolder(path=path).metrics
    if not file.exists():
        raise errors.NotFoundError(f"no metrics at {file}")
    lines = atomic.read_bytes(file, records.MOST_RECORD_BYTES).splitlines()
    return [records.parse(MetricsRow, line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def _lasting(summary: Summary) -> run_files.Facts:
    lasting = {key: value for key, value in summary.document().items() if key not in VOLATILE}
    return run_files.Facts(digest=records.digest_of(lasting))


def _parse_checkpoint(data: bytes, path: Path) -> tuple[dict[str, Tensor], Checkpoint]:
    length = int.from_bytes(data[:8], "little")
    if length > MOST_HEADER_BYTES:
        raise errors.UnsafeError(
            f"checkpoint {path} lists its tensors in {length} bytes, expected at most {MOST_HEADER_BYTES}"
        )
    try:
        header = records.parse_json(data[8 : 8 + length], path)
        record = records.parse(Checkpoint, header["__metadata__"][RECORD_KEY].encode(), path)
        return safetensors.torch.load(data), record
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise errors.CorruptionError(f"checkpoint {path} is damaged: {error}; start a new run") from None


def _remove_other_checkpoints(folder: RunFolder) -> None:
    current = read_sealed(folder.pointer, Pointer).file if folder.pointer.exists() else None
    for path in folder.checkpoints.glob("*.safetensors"):
        if path.name != current:
            atomic.remove(path)


def condensed_set(run: Path) -> Path:
    """Return the final manifest of a run, or a placeholder if it is not finished; raises MismatchError for a `fit`."""
    if not (run / "summary.json").exists():
        return run / "(its condensed set)"
    if (name := read_summary(run).condensed_set) is None:
        raise errors.MismatchError(f"the run in {run} is a `fit` and has no condensed set; give one that `train` made")
    return run / name
