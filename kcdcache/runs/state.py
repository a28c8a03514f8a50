"""A run's folder: settings, environment, checkpoints, manifests, metrics and summary."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from pydantic_core import to_jsonable_python
from safetensors import SafetensorError
from torch import Tensor

from kcdcache.condense import manifest
from kcdcache.condense.compare import SetCounts
from kcdcache.condense.manifest import Manifest
from kcdcache.data.label_noise import NOISE_SEED
from kcdcache.environment import changed, check_environment, environment
from kcdcache.errors import (
    CorruptionError,
    MismatchError,
    NotFoundError,
    SettingsError,
    UnfinishedError,
    UnsafeError,
    first_difference,
    require_same,
)
from kcdcache.files import run_files
from kcdcache.files.atomic import (
    append,
    locked,
    read_bytes,
    remove,
    remove_leftovers,
    require_no_links,
    sha256_bytes,
    write_atomic,
)
from kcdcache.files.records import (
    MOST_RECORD_BYTES,
    Rate,
    Sealed,
    Sha256,
    Sparse,
    canonical_json,
    digest_of,
    parse,
    parse_json,
    read_sealed,
    readable_json,
    sealed_json,
)
from kcdcache.networks.input_transform import resolve_device
from kcdcache.networks.weights import MOST_HEADER_BYTES
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import MachineSettings

RECORD_KEY = "kcdcache"
VOLATILE = ("seconds", "images_per_second", "store_teacher_forwards")
"""entries of a summary that the clock, or a store that grew, changes"""


class Environment(Sparse):
    """Where a run, or a part of it, was done: see `environment.environment`."""

    python: str
    versions: dict[str, str]
    device: str
    device_name: str
    threads: int
    processes: int = 1
    """earlier commits had one and did not say so"""
    git_commit: str | None
    command: str


class Inputs(Sparse):
    """What a run was made from, by digests; a `fit` has `data` and `test` alone."""

    test: str
    """digest of the test split"""
    data: str | None = None
    """digest of the training split, of a `fit`"""
    knowledge_id: str | None = None
    views: int | None = None
    """cached views it cycles through"""
    encodings: dict[str, str] | None = None
    """field of the store -> how it is encoded"""
    teacher_batch: int | None = None
    given: str | None = None
    """digest of the condensed set it began with, if one was given"""
    skipped: list[int] | None = None
    """samples the store has nothing of"""


class RunRecord(Sparse):
    """What run.json says."""

    settings: dict[str, Any]
    """those of the command, without what never changes a result"""
    inputs: Inputs
    environment: Environment
    changes: list[Environment]
    """where it went on after `--allow-env-change`"""

    @property
    def latest(self) -> Environment:
        """Where it went on last."""
        return [self.environment, *self.changes][-1]


class MetricsRow(Sparse):
    """A line of metrics.jsonl: one epoch. Losses are in nats, accuracies and agreement are shares in [0, 1]."""

    epoch: int
    """from 0"""
    learning_rate: float
    samples: int
    """forwarded by the student in this epoch"""
    samples_so_far: int
    loss: float
    train_accuracy: float
    agreement: float | None = None
    """how often student and teacher named the same class"""
    test_accuracy: float | None = None
    """unset, as the two below, where the epoch was not evaluated"""
    test_loss: float | None = None
    test_calibration_error: float | None = None
    view: int
    stage: int | None = None
    """unset, as all below, in a `fit`"""
    kept: int | None = None
    mixed: int | None = None
    rows_read: int | None = None
    """from the store, by all processes"""
    bytes_read: int | None = None
    rows_read_by_each: list[int] | None = None
    """by each of several processes"""
    bytes_read_by_each: list[int] | None = None


class CorruptionRecord(Sparse):
    """What a data spec did to the training split: see `label_noise.Corruption`."""

    noise: float | None = None
    noise_seed: int = NOISE_SEED
    redraw: bool = True
    gamma: float | None = None
    n_max: int | None = None
    n_min: int | None = None


class Outcome(Sparse):
    """What every summary holds, from a finished run's metrics. The last accuracy is the result; the best one was chosen
    on the test split and is for comparison with papers that report it."""

    accuracy_last: float
    """on the test split after the last epoch, in [0, 1]"""
    accuracy_best: float
    best_epoch: int
    calibration_error: float
    relative_cost: float
    """C of Eq. 16, counted: student samples forwarded / (count x epochs)"""
    student_samples: int
    epochs: int
    count: int
    """N, of the training split"""


class Summary(Outcome):
    """What came of a run: summary.json. Entries that its command, data or options do not give are unset."""

    kind: Literal["fit", "train"]
    model: str
    teacher_forwards: int
    """of this run alone: mixes that the teacher was asked about"""
    seconds: float
    images_per_second: Rate | None = None

    finished: bool | None = None
    """true of every `train`; unset, as all below to `condensed_set`, of a `fit`"""
    method: str | None = None
    knowledge_id: str | None = None
    store_teacher_forwards: int | None = None
    rows_read: int | None = None
    bytes_read: int | None = None
    kept: int | None = None
    """samples of the exported set"""
    condensed_set: Annotated[str, Field(pattern=r"^stages/[0-9]+/manifest\.parquet$")] | None = None
    """its manifest, relative to the run"""

    corruption: CorruptionRecord | None = None
    mislabelled: int | None = None
    true_labels: str | None = None
    """digest of the labels before label noise"""
    class_sizes: list[int] | None = None
    teacher_data: Literal["same", "other"] | None = None
    """whether the teacher learned from the same training split"""

    agreement_train: float | None = None
    """this and all below: see `evaluation.fidelity`"""
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
    """What a checkpoint holds beside tensors."""

    epoch: int
    """number of finished epochs"""
    step: int
    """number of finished steps of the current epoch"""
    samples: int
    """student samples forwarded so far"""
    rows: list[MetricsRow]
    """one per finished epoch"""
    optimizer: dict[str, Any] | None = None
    """what is no tensor of its state; unset by an older kcdcache"""
    run: Sha256 | None = Field(default=None, exclude=True)
    """id of the run, in the file alone"""


class Pointer(Sealed):
    """What checkpoint/latest.json says: which file is the run's checkpoint."""

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
        SettingsError, MismatchError: the folder holds another run, or this machine is not the run's.
    """
    device = resolve_device(machine.device)
    require_no_links(folder.path)
    with locked(folder.lock):
        record = start(folder, settings, inputs)
        _remove_other_checkpoints(folder)  # a kill may fall between a new checkpoint and the old one's removal
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
    """Write the record of a run that begins, or goes on where it may."""
    known, here = record.latest.document(), now.document()
    if changed(known, here):
        check_environment(known, here, allow_change)
        write_record(folder, record.model_copy(update={"changes": [*record.changes, now]}))
    elif not folder.settings.exists():
        write_record(folder, record)


def start(folder: RunFolder, settings: Mapping[str, Any], inputs: Inputs) -> RunRecord | None:
    """Return the record of the run already in this folder, or None where a new one begins.

    Raises:
        SettingsError: the folder holds a run with other settings; names the first.
        MismatchError: the folder holds a run on other inputs, or no run but something else; names the first.
    """
    remove_leftovers(folder.path)
    if not folder.settings.exists():
        if others := [p.name for p in folder.path.iterdir() if not p.name.startswith(folder.lock.name)]:
            raise MismatchError(
                f"{folder.path} holds {others[0]} but no run.json; give an empty or new folder as --out"
            )
        return None
    record = read_record(folder)
    if difference := first_difference(record.settings, to_jsonable_python(settings)):
        name, was, now = difference
        raise SettingsError(
            f"{folder.path} holds a run with {name} = {was!r}, asked for now: {now!r}; "
            "give the same settings to continue it, or another --out"
        )
    names = (f"the run in {folder.path}", "what was given now")
    require_same(record.inputs.document(), inputs.document(), names, "use another --out")
    return record


def outcome(rows: Sequence[MetricsRow], count: int, epochs: int) -> Outcome:
    """Return what a finished run came to, from its rows of metrics and the number of samples and epochs."""
    last = rows[-1]
    measured = {row.test_accuracy: row.epoch for row in reversed(rows) if row.test_accuracy is not None}  # the first
    assert last.test_accuracy is not None
    assert last.test_calibration_error is not None
    return Outcome(
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
    write_atomic(folder.settings, sealed_json(record.document(), readable_json))


def read_record(folder: RunFolder) -> RunRecord:
    """Return what run.json holds: settings, inputs, environment and the changes to it that were allowed.

    Raises:
        NotFoundError: there is no run.
        CorruptionError: it is damaged, or was changed after it was written.
    """
    return read_sealed(folder.settings, RunRecord, readable_json)


def write_manifest(folder: RunFolder, path: Path, made: Manifest) -> None:
    """Write a manifest into the run and its rows, digest and SHA-256 into the run's record.

    Raises:
        LockedError: another one stands there.
        NoSpaceError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not folder.stands(path):
        remove(path)  # a kill fell before its record: written again, from the start
    with run_files.writing(folder.path, {folder.name_of(path): run_files.Facts(len(made), made.digest)}):
        manifest.write(path, made)


def save_checkpoint(folder: RunFolder, tensors: Mapping[str, Tensor], record: Checkpoint) -> None:
    """Replace the run's checkpoint; a kill at any moment leaves the old one or the new one."""
    folder.checkpoints.mkdir(exist_ok=True)
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = canonical_json({**record.document(), "run": run_files.run_id(folder.path)})
    data = safetensors.torch.save(owned, metadata={RECORD_KEY: content.decode()})
    digest = sha256_bytes(data)
    name = f"{digest[:16]}.safetensors"
    write_atomic(folder.checkpoints / name, data)
    write_atomic(folder.pointer, sealed_json(Pointer(file=name, sha256=digest).document()))
    _remove_other_checkpoints(folder)


def load_checkpoint(folder: RunFolder) -> tuple[dict[str, Tensor], Checkpoint] | None:
    """Return the tensors and the record of the run's checkpoint, or None if there is none yet.

    Raises:
        CorruptionError: the file is missing or does not match its SHA-256.
        MismatchError: it is another run's; prints both ids.
        UnsafeError: it, or the list of its tensors, is larger than any of ours.
    """
    if not folder.pointer.exists():
        return None
    pointer = read_sealed(folder.pointer, Pointer)
    path = folder.checkpoints / pointer.file
    data = read_bytes(path) if path.exists() else b""
    if sha256_bytes(data) != pointer.sha256:
        raise CorruptionError(
            f"checkpoint {path} is damaged: its SHA-256 is not the one in {folder.pointer}; start the run anew"
        )
    tensors, record = _parse_checkpoint(data, path)
    if record.run != (own := run_files.run_id(folder.path)):
        raise MismatchError(
            f"checkpoint {path} is of run {record.run}, {folder.settings} of {own}; put the run's own back"
        )
    return tensors, record


def write_metrics(folder: RunFolder, rows: Sequence[MetricsRow]) -> None:
    """Make metrics.jsonl hold exactly these rows, one epoch a line."""
    write_atomic(folder.metrics, metrics_lines(rows))


def metrics_lines(rows: Sequence[MetricsRow]) -> bytes:
    """Return metrics.jsonl with these rows."""
    return b"".join(canonical_json(row.document()) + b"\n" for row in rows)


def add_timing(folder: RunFolder, row: Mapping[str, Any]) -> None:
    """Append a line of clock times, which differ from run to run and so stand apart from the metrics."""
    append(folder.timing, canonical_json(row) + b"\n")


def write_summary(folder: RunFolder, summary: Summary) -> None:
    """Write summary.json with a digest of its own, and that of its lasting part into the run's record."""
    with run_files.writing(folder.path, {folder.summary.name: _lasting(summary)}):
        write_atomic(folder.summary, sealed_json(summary.document(), readable_json))


def read_summary(path: Path) -> Summary:
    """Return a finished run's summary.

    Raises:
        NotFoundError: there is no run.
        UnfinishedError: the run has not ended.
        CorruptionError: the summary is damaged, or of an older kcdcache that wrote no digest.
        MismatchError: it is another run's.
    """
    folder = RunFolder(path=path)
    if folder.summary.exists():
        summary = read_sealed(folder.summary, Summary, readable_json)
        run_files.require(folder.summary, _lasting(summary))
        return summary
    if folder.settings.exists():
        raise UnfinishedError(f"the run in {path} is not finished; run its command again to continue it")
    raise NotFoundError(f"no run at {path}")


def read_metrics(path: Path) -> list[MetricsRow]:
    """Return the rows of a run's metrics.jsonl, one per epoch.

    Raises:
        NotFoundError: the run has none.
        CorruptionError: a line holds something else; names it.
        UnsafeError: it is no plain file, or larger than any of ours.
    """
    file = RunFolder(path=path).metrics
    if not file.exists():
        raise NotFoundError(f"no metrics at {file}")
    lines = read_bytes(file, MOST_RECORD_BYTES).splitlines()
    return [parse(MetricsRow, line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def _lasting(summary: Summary) -> run_files.Facts:
    lasting = {key: value for key, value in summary.document().items() if key not in VOLATILE}
    return run_files.Facts(digest=digest_of(lasting))


def _parse_checkpoint(data: bytes, path: Path) -> tuple[dict[str, Tensor], Checkpoint]:
    length = int.from_bytes(data[:8], "little")
    if length > MOST_HEADER_BYTES:
        raise UnsafeError(
            f"checkpoint {path} lists its tensors in {length} bytes, expected at most {MOST_HEADER_BYTES}"
        )
    try:
        header = parse_json(data[8 : 8 + length], path)
        record = parse(Checkpoint, header["__metadata__"][RECORD_KEY].encode(), path)
        return safetensors.torch.load(data), record
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CorruptionError(f"checkpoint {path} is damaged: {error}; start the run anew") from None


def _remove_other_checkpoints(folder: RunFolder) -> None:
    current = read_sealed(folder.pointer, Pointer).file if folder.pointer.exists() else None
    for path in folder.checkpoints.glob("*.safetensors"):
        if path.name != current:
            remove(path)


def condensed_set(run: Path) -> Path:
    """Return the manifest that a finished run exported; in a plan of a run not yet made, where its folder will be.

    Raises:
        MismatchError: the run is a `fit`, which has none.
    """
    if not (run / "summary.json").exists():
        return run / "(its condensed set)"
    if (name := read_summary(run).condensed_set) is None:
        raise MismatchError(f"the run in {run} is a `fit` and has no condensed set; give one that `train` made")
    return run / name
