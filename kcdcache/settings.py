"""Frozen settings: one model per stage, one per command composed of them; from TOML and flags, unknown keys refused.

Defaults stand here and nowhere else. The command line and the recipes are made from these models, so a field's
docstring is its help text, and a command's first line says in `kcdcache --help` what it does.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kcdcache.errors import NotFoundError, SettingsError, nearest

Augment = Literal["none", "crop", "crop-flip", "resized-crop-flip"]
Fill = Literal["zero", "reflect"]
ScheduleName = Literal["end_of_stage", "alg1_shift", "paper_stage", "reference_linear", "poster"]
Precision = Literal["float32", "bfloat16"]


class Settings(BaseModel):
    """The root of all settings: frozen, keyword-only, finite, no unknown keys, documented by field docstrings."""

    # built when first used: a command needs one of these models and should not wait for the others
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
    )


class Composed(Settings):
    """Settings of a command: some of its own, and parts; flags and recipes give the settings of all in one table."""

    @property
    def given(self) -> set[str]:
        """Names of the settings that the user gave, those of the parts included."""
        inner = parts(type(self))
        return (self.model_fields_set - inner.keys()).union(*(getattr(self, name).model_fields_set for name in inner))

    @model_validator(mode="before")
    @classmethod
    def _sort_into_parts(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        rest, inner = dict(values), parts(cls).items()
        return {name: {key: rest.pop(key) for key in part.model_fields if key in rest} for name, part in inner} | rest


def parts(model: type[BaseModel]) -> dict[str, type[Settings]]:
    """Return the name and model of each part of a command's settings; other settings have none."""
    if not issubclass(model, Composed):
        return {}
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Settings)}


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return all that flags and recipes may set of a model, by name: its own settings, then those of its parts."""
    inner = parts(model)
    own = {name: field for name, field in model.model_fields.items() if name not in inner}
    return own | {name: field for part in inner.values() for name, field in part.model_fields.items()}


def values_of(given: Settings) -> dict[str, Any]:
    """Return the values of all that flags and recipes may set, by name."""
    inner = parts(type(given))
    own = {name: value for name, value in given if name not in inner}
    return own | {name: value for part in inner for name, value in getattr(given, part)}


class ViewSettings(Settings):
    """Which augmented views of an image exist; part of the knowledge's identity."""

    augment: Augment = "crop-flip"
    """rule that makes views: none, crop, crop-flip or resized-crop-flip"""
    padding: int = Field(default=4, ge=0, le=64)
    """pixels of padding on each side before a crop"""
    fill: Fill = "zero"
    """what the padding holds: zero, or the reflected image"""
    size: int | None = Field(default=None, ge=1, le=4096)
    """side of the square output in pixels; the image's own size if unset (required for images of differing size)"""
    view_seed: int = Field(default=0, ge=0, lt=2**64)
    """seed of the views"""


@dataclass(frozen=True, kw_only=True)
class ViewRule:
    """Which views of images of a known size exist, as a store records it; two equal rules give equal views."""

    rule: str
    """none, crop, crop-flip or resized-crop-flip"""
    padding: int
    """pixels added on each side before a crop"""
    fill: str
    """what the padding holds: zero or reflect"""
    size: tuple[int, int]
    """height and width of a view in pixels"""
    seed: int
    """seed of the views, in [0, 2^64)"""

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.rule


class PrecomputeSettings(ViewSettings):
    """How the teacher's outputs become a store."""

    views: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """views cached per sample, or 'all' for the rule's whole finite set"""
    fields: tuple[str, ...] = ("logits",)
    """teacher outputs to keep: logits, penultimate, attention, fsp, maps:STAGE, rotations, boundary"""
    encoding: str = "float16"
    """how logits are stored: float16, float32 or top:K"""
    budget_gb: float = Field(default=64, gt=0)
    """size above which a store is refused before anything is written: feature maps of many views are large"""
    compression: Literal["none", "zstd"] = "none"
    """chunk compression; zstd saves about 15 % and halves the read rate"""
    batch_size: int = Field(default=256, ge=1)
    """teacher batch within a part; another size changes the last bits, so it is part of the store's plan"""
    teacher_precision: Precision = "float32"
    """arithmetic of the teacher's forward pass"""
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """teacher accuracy below which precompute refuses; three times chance if unset, 0 switches it off"""
    workers: int | None = Field(default=None, ge=1)
    """threads that decode and resize images ahead; as many as --threads if unset. Never changes results"""
    on_nonfinite: Literal["refuse", "skip"] = "refuse"
    """what to do with samples whose outputs are NaN, infinite or too large for the encoding: refuse, or skip them (at
    most 1 % of all), which leaves them out of all training; keep fractions stay fractions of all samples"""


class OptimizerSettings(Settings):
    """SGD and its schedule; the defaults are the CIFAR recipe of CRD/RepDistiller, which the paper uses."""

    epochs: int = Field(default=240, ge=1)
    """epochs in all"""
    batch_size: int = Field(default=64, ge=1)
    """samples per step"""
    learning_rate: float = Field(default=0.05, gt=0)
    """initial learning rate; where unset, `train` takes its method's authors' (0.01 for MobileNetV2 and ShuffleNets)"""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD momentum"""
    nesterov: bool = False
    """Nesterov momentum"""
    weight_decay: float = Field(default=5e-4, ge=0)
    """L2 penalty on all parameters"""
    decay: Literal["milestones", "cosine", "constant"] = "milestones"
    """shape of the learning rate over epochs"""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.625, 0.75, 0.875)
    """where the learning rate drops, as shares of all epochs in (0, 1): 0.625 of 240 epochs is epoch 150"""
    decay_factor: float = Field(default=0.1, gt=0, le=1)
    """factor of each drop"""
    warmup_epochs: float = Field(default=0, ge=0)
    """epochs of linear learning rate warm-up"""
    clock: Literal["epochs", "samples"] = "epochs"
    """what the milestones count: epochs (as the paper's code), or the share of all samples consumed, so that a
    shrinking set gets the same share of steps at each learning rate"""
    precision: Precision = "float32"
    """arithmetic of the forward pass: float32, or bfloat16 autocast"""
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    """label smoothing of the hard-label cross-entropy"""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """seed of initial weights and sample order"""
    evaluate_every: int = Field(default=1, ge=1)
    """epochs between measurements on the test split; the last epoch is always measured"""
    checkpoint_seconds: float = Field(default=60, ge=0)
    """least time between checkpoints inside an epoch, beside the one after every epoch; never changes results"""
    resident: Literal["auto", "on", "off"] = "auto"
    """keep images, view parameters and knowledge on the device and make batches there: auto does so on a GPU if they
    take at most half of its free memory. Never changes results on a CPU"""
    workers: int | None = Field(default=None, ge=1)
    """threads that decode and resize images ahead; as many as --threads if unset. Never changes results"""
    graphs: bool = True
    """where batches are made on a GPU, replay each full step as one CUDA graph"""
    compile: bool = False
    """train through torch.compile, which needs a C++ compiler; changes the last bits"""
    sync_bn: bool = False
    """under torchrun on GPUs, take batch statistics over all processes instead of each its own"""


class FitSettings(OptimizerSettings, ViewSettings):
    """How a teacher or a plain baseline is trained on hard labels."""

    views: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """augmented views to cycle through, or 'all' of them"""


class MethodSettings(Settings):
    """The distillation method and how mixed points are taught."""

    method: str = "kd"
    """distillation method (`kcdcache methods` lists them), or several: kd+at, with other weights kd*0.5+at*500"""
    gamma: float | None = Field(default=None, ge=0)
    """weight of the hard-label cross-entropy; the method's own default if unset (kd: 0.1)"""
    alpha: float | None = Field(default=None, ge=0)
    """weight of the soft-label term T^2 KL; the method's own default if unset (kd: 0.9)"""
    beta: float | None = Field(default=None, ge=0)
    """weight of the method's own term; the method's own default if unset (at: 1000)"""
    temperature: float | None = Field(default=None, gt=0)
    """distillation temperature; the method's own default if unset (kd: 4)"""
    mix: Literal["convex", "additive_clip"] = "convex"
    """how K_Aug images are mixed: (1-eps) x + eps x0, or x + eps x0 clipped to [0, 1]"""
    mix_target: Literal["linear_prob", "linear_logit", "keep", "requery"] = "linear_prob"
    """teacher target of a mixed point: mixed cached probabilities, mixed cached logits, the kept point's own, or
    the teacher run on the mix"""
    mix_label: Literal["keep", "mix"] = "keep"
    """hard label of a mixed point: the kept point's own, or mixed in the same shares"""
    observed: Literal["entropy", "loss"] = "entropy"
    """what is recorded of each sample: the entropy of the student's prediction (Eq. 7), or its loss"""
    record_mixed: bool = True
    """record values measured on mixed points under the kept point's index"""
    record: Literal["mean", "last", "ema"] = "mean"
    """what a value is: the running mean over all visits (Eq. 12), the latest observation, or a moving average"""
    record_decay: float = Field(default=0.9, ge=0, lt=1)
    """weight of the past when record is 'ema'"""
    crd_negatives: int = Field(default=16384, ge=1)
    """negatives per sample of crd and wcord, drawn from other classes"""
    crd_bank: Literal["whole", "kept"] = "whole"
    """what crd and wcord draw negatives from: the whole data, or only the stage's kept samples"""
    kr_lambda: float = Field(default=0.05, ge=0)
    """kr: difference of logarithms up to which two probabilities count as equal; 0 is plain matching"""
    kr_temperature: float | None = Field(default=None, gt=0)
    """kr: temperature at which numbers become a distribution; 0.1 for filter norms, 1 for pooled channels if unset"""
    kr_schedule: Literal["linear", "constant"] = "linear"
    """kr: its weight falls linearly over all epochs, or stays"""
    peer: str = ""
    """network that learns beside the student in dml; the student's own architecture if unset"""


class ScheduleSettings(Settings):
    """How much is kept when."""

    keep: float = Field(default=0.7, gt=0, le=1)
    """rho: share of all samples in the exported condensed set"""
    stages: int = Field(default=6, ge=1)
    """number of stages; epochs must be a multiple of it"""
    schedule: ScheduleName = "end_of_stage"
    """when and how fast the set shrinks: end_of_stage, alg1_shift, paper_stage, reference_linear or poster"""


class CondenseSettings(Settings):
    """How values become a manifest; every option is a named reading of the paper (facts.md 1.4)."""

    k0: Literal["complement", "stage_slice"] = "complement"
    """which dropped points are mixed in: all of them, or only those just under the cut"""
    candidates: Literal["global", "current"] = "global"
    """who competes: all samples (dropped ones can return), or only the current set"""
    eps_grid: Literal["zero_based", "one_based", "inclusive", "constant"] = "zero_based"
    """how the mixing share grows down the ranks: eps_max i/L, (i+1)/L, i/(L-1), or constant"""
    eps_max: float = Field(default=0.3, ge=0, le=1)
    """largest share of a dropped point in a mix"""
    augment_kept: bool = True
    """mix dropped points into the lowest kept ones (VAKS); off is direct selection"""
    ranking: Literal["value", "random"] = "value"
    """rank by value, or at random with the same sizes (the control)"""
    cost_exponent: float = Field(default=0.03, ge=0)
    """alpha of Eq. 13: score = value * visits^alpha; 0 switches cost-aware ranking off"""
    unseen: Literal["first", "last"] = "first"
    """rank of samples that were never visited"""
    stratify: bool = False
    """keep the same share of every class"""
    condense_seed: int = Field(default=0, ge=0, lt=2**64)
    """seed of random rankings and random first sets; a run that draws any takes its own --seed unless this is given"""


class SamplingSettings(Settings):
    """Which points of the current set an epoch visits."""

    sampling: Literal["all", "random_per_epoch", "random_fixed", "infobatch", "unix"] = "all"
    """which points of the set an epoch visits: all; a random share, new in every epoch (RS2) or fixed for the run;
    infobatch, which thins out what is below the mean loss; or unix, which mixes within each batch"""
    sample_share: float = Field(default=0.75, gt=0, le=1)
    """share of the set that an epoch visits, for random_per_epoch, random_fixed and unix"""
    prune_probability: float = Field(default=0.5, ge=0, lt=1)
    """infobatch: chance that a sample below the mean is left out of an epoch"""
    prune_until: float = Field(default=0.875, ge=0, le=1)
    """infobatch: share of the epochs after which every sample is visited"""
    unix_clear: float = Field(default=0.5, gt=0, le=1)
    """unix: share of a pool, the most uncertain, that is mixed least (b / 64 in its release)"""
    unix_slope: float = Field(default=10, gt=0)
    """unix: how sharply mixing grows with certainty (w in its release)"""


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"schedule": "alg1_shift", "k0": "complement", "candidates": "global", "eps_grid": "zero_based",
              "mix": "convex", "mix_label": "keep", "mix_target": "linear_prob"},
    "release": {"schedule": "reference_linear", "k0": "stage_slice", "candidates": "global", "eps_grid": "zero_based",
                "mix": "convex", "mix_label": "keep", "mix_target": "requery"},
}  # fmt: skip
"""named set of readings -> its settings

`release` cannot repeat the released code's images: that writes its mixes over the data at every stage, as bytes that it
truncates and does not round, and from stage 2 on 39-66 % of the partners are mixes themselves. Here each stage mixes
the original images.
"""
SAMPLING_PRESETS: dict[str, dict[str, Any]] = {"infobatch": {"observed": "loss", "record": "last", "keep": 1.0}}
"""what a way of sampling presupposes: scores by the last loss, and no condensing"""


def with_presets(model: type[BaseModel], values: Any) -> Any:
    """Return raw values over those of the preset and the sampling they name, as far as the model has such settings."""
    if not isinstance(values, Mapping):
        return values
    chosen = SAMPLING_PRESETS.get(str(values.get("sampling")), {}) | PRESETS.get(str(values.get("preset")), {})
    return {key: value for key, value in chosen.items() if key in fields(model)} | dict(values)


class TrainSettings(OptimizerSettings, MethodSettings, ScheduleSettings, CondenseSettings, SamplingSettings):
    """Everything that decides a student's run."""

    student: str = ""
    """network of the student"""
    preset: Literal["paper", "release"] | None = None
    """named set of readings: 'paper', or 'release' (the authors' code, but for mixes of mixes); flags beside it win"""
    cached_views: int | None = Field(default=None, ge=1)
    """use only the first so many of the store's views; all of them if unset"""
    fidelity: Literal["auto", "on", "off"] = "auto"
    """measure the finished student on its training samples too: agreement with the teacher, right and wrong labels;
    with --teacher also on the test split. Costs a forward pass over both; auto does so where the data spec corrupts
    labels or classes. A finished run is measured when its command is given again. Never changes the student"""
    memory_gb: float = Field(default=8, gt=0)
    """memory for decoded knowledge; above it a memory-mapped file in the run's folder serves. Never changes results"""

    @model_validator(mode="before")
    @classmethod
    def _apply_presets(cls, values: Any) -> Any:
        found = with_presets(cls, values)
        if isinstance(found, dict) and "seed" in found:
            draws = found.get("ranking") == "random" or found.get("schedule") == "paper_stage"
            return ({"condense_seed": found["seed"]} if draws else {}) | found  # runs of other seeds draw other sets
        return found


NEUTRAL = {"checkpoint_seconds", "memory_gb", "resident", "graphs", "workers", "fidelity"}
"""settings of a student's run that never change it and so may differ when it continues"""
SINCE_RECORDS = ("kr_lambda", "kr_temperature", "kr_schedule")
"""settings of methods that came later: records leave them out at their defaults, so that older runs go on"""


def recorded(settings: TrainSettings) -> dict[str, Any]:
    """Return a run's settings as its record holds them: all that decide its bytes."""
    fields = type(settings).model_fields
    idle = {name for name in SINCE_RECORDS if getattr(settings, name) == fields[name].default}
    return settings.model_dump(mode="json", exclude=NEUTRAL | idle)


class MachineSettings(Settings):
    """Where a stage runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes a GPU where there is one"""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores if unset. Training results depend on it in their last bits"""
    allow_env_change: bool = False
    """continue a run although device, thread count or versions changed; recorded in run.json"""


class TeacherSettings(Settings):
    """Which network teaches."""

    teacher: str | None = None
    """a folder written by `fit` or `train`, or a network's name together with --weights"""
    weights: Path | None = None
    """safetensors or weights_only-safe torch file of a named teacher"""
    teacher_mean: tuple[float, ...] | None = None
    """mean per channel a named teacher expects; the data's own if unset"""
    teacher_std: tuple[float, ...] | None = None
    """standard deviation per channel a named teacher expects; the data's own if unset"""
    teacher_size: int | None = Field(default=None, ge=1)
    """side in pixels a named teacher's input is resized to"""


PART_ROWS = 2**24
"""samples of each part, unless told otherwise: some 100 MB of a condensed set"""


class FitCommand(Composed):
    """What `fit` takes."""

    data: str
    """data spec: digits, cifar10[:DIR], cifar100[:DIR], folder:DIR, parquet:DIR[#label], arrays:FILE.npz"""
    model: str
    """network to train"""
    out: Path
    """folder of the run"""
    machine: MachineSettings
    training: FitSettings


class PrecomputeCommand(Composed):
    """What `precompute` takes."""

    data: str
    """data spec, as for fit"""
    store: Path
    """folder of the store"""
    for_: str | None = Field(default=None, validation_alias=AliasChoices("for_", "for"))
    """keep what this method (or several, kd+at) reads of the teacher for the --student, instead of --fields"""
    student: str = ""
    """network of the student that --for is about"""
    manifest: Path | None = None
    """add the teacher's outputs on this manifest's mixes, beside it, instead of making a store"""
    mix: Literal["convex", "additive_clip"] = "convex"
    """how the manifest's images are mixed"""
    from_logits: Path | None = None
    """import logits made elsewhere: an .npy file of shape (views, N, C) or (N, C)"""
    shard: str | None = None
    """write only every N-th part from the I-th on, as one of N processes: I/N, such as 0/4; the last one seals. Unset,
    it is this process's place under torchrun, in a SLURM array or under srun, if there is one; 0/1 is all parts"""
    machine: MachineSettings
    teaching: TeacherSettings
    precompute: PrecomputeSettings


class TrainCommand(Composed):
    """What `train` takes."""

    store: Path | None = None
    """folder of the store; needed unless --condensed is given"""
    data: str
    """data spec, as for precompute; condensed:DIR for the images that an exported set brings"""
    out: Path
    """folder of the run"""
    manifest: Path | None = None
    """condensed set to start from; for a run at the start of a stage, that stage's manifest"""
    condensed: Path | None = None
    """exported set to train from, instead of --store and --manifest; taken as it is unless --stages is given"""
    transfer: bool = False
    """accept a condensed set made for another teacher's store of the same data"""
    until: int | None = Field(default=None, ge=1)
    """stop when that many epochs are finished; the same command continues"""
    expect_id: tuple[str, ...] | None = None
    """ids that store and condensed set must have (inspect shows them): refuse anything else"""
    machine: MachineSettings
    teaching: TeacherSettings
    training: TrainSettings


class CondenseCommand(Composed):
    """What `condense` takes."""

    values: Path
    """values file: a run's values.parquet, or any parquet file with the columns index and value; or several, as a
    folder or a pattern such as 'values/*.parquet'"""
    store: Path
    """folder of the store the values belong to"""
    keep: float = Field(gt=0, le=1)
    """share of all samples to keep"""
    out: Path
    """manifest to write: a parquet file, or of more samples than --partition-rows a folder of them"""
    previous: Path | None = None
    """manifest the values were last updated on; all samples if unset"""
    preset: Literal["paper", "release"] | None = None
    """named set of readings, as for train; flags given beside it win"""
    stage: int | None = Field(default=None, ge=0)
    """number of the stage the manifest is for; one more than the previous manifest's if unset"""
    partition_rows: int = Field(default=PART_ROWS, ge=1)
    """write manifests of more samples than this in parts, each of so many samples"""
    memory_gb: float = Field(default=8, gt=0)
    """memory for what is kept of the samples, about 9 bytes for each (33 at random or by class); DuckDB
    and files beside --out serve beyond it (extra `large`). Never changes results"""
    expect_id: tuple[str, ...] | None = None
    """ids that store, values and previous manifest must have (inspect shows them): refuse anything else"""
    rules: CondenseSettings

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return with_presets(cls, values)


class ExportCommand(Settings):
    """What `export` takes."""

    manifest: Path
    """condensed set to export, or a finished run's folder for the set it ended with"""
    store: Path
    """folder of the store the set was made for"""
    out: Path
    """folder of the exported set"""
    data: str | None = None
    """data spec of the store; needed with --with-images, otherwise only compared"""
    with_images: bool = False
    """bring the images of kept samples and partners and the test split, so that no data set is needed to train"""
    views: int | None = Field(default=None, ge=1)
    """export only the first so many cached views; all if unset"""
    bake: bool = False
    """keep the mixed targets at one --temperature instead of both points' own outputs; serves kd alone"""
    temperature: float | None = Field(default=None, gt=0)
    """distillation temperature of baked targets; training at another one is refused"""
    mix_target: Literal["linear_prob", "linear_logit", "keep"] = "linear_prob"
    """how baked targets are mixed, as for train"""
    mix: Literal["convex", "additive_clip"] = "convex"
    """how the images of baked targets are mixed, as for train"""
    compression: Literal["none", "zstd"] = "none"
    """chunk compression; zstd saves about 15 % and halves the read rate"""
    license: str = "unknown"
    """licence that the dataset card names, by the hub's identifiers such as cc-by-4.0"""
    expect_id: tuple[str, ...] | None = None
    """ids that store and condensed set must have (inspect shows them): refuse anything else"""


def _by_place(metavar: str, **more: Any) -> Any:
    """Return a setting that the command line takes by its place; its description says what it is."""
    return Field(json_schema_extra={"argument": metavar}, **more)


class SealCommand(Settings):
    """What `seal` takes."""

    path: Path = _by_place("PATH")
    """a store's folder"""


class InspectCommand(Settings):
    """What `inspect` takes."""

    path: Path = _by_place("PATH")
    """a store, manifest, values file, run, exported set or network"""


class DiffCommand(Settings):
    """What `diff` takes."""

    a: Path = _by_place("A")
    """a manifest, run or exported set"""
    b: Path = _by_place("B")
    """what it is compared with, another of these"""


class MethodsCommand(Settings):
    """What `methods` takes."""

    teacher: str = "wrn_40_2"
    """network of the teacher"""
    student: str = "wrn_16_2"
    """network of the student"""
    classes: int = Field(default=100, ge=2)
    """number of classes"""
    size: int = Field(default=32, ge=1)
    """side of views in pixels"""
    encoding: str = "float16"
    """as for precompute"""


class ReportCommand(Settings):
    """What `report` takes."""

    paths: tuple[Path, ...] = _by_place("RUN_OR_FOLDER...", min_length=1)
    """a run's folder, or a folder of runs such as a recipe's --out"""
    out: Path | None = None
    """HTML file; a report there is replaced  [default: report.html in the one folder]"""
    data: str | None = None
    """data spec for the images; the recipe's if unset, where it can be loaded"""
    reference: str | None = None
    """row that the others are compared with  [default: kd, or the first trained]"""
    json_file: Path | None = None
    """JSON file for all numbers of the report"""
    csv: Path | None = None
    """folder for one CSV file per table"""


class VerifyCommand(Composed):
    """What `verify` takes."""

    path: Path = _by_place("PATH")
    """a store, manifest, values file, run, exported set or network; of a store, records, listing and sizes are compared
    unless --read-data or --sample reads the chunks too"""
    read_data: bool = False
    """read and hash every chunk file of a store"""
    sample: str | None = None
    """read and hash a share of the chunk files, such as 5%"""
    data: str | None = None
    """data spec of the store: are they the ones it was made from?"""
    points: int = 512
    """points to compute again, at least"""
    sample_seed: int = 0
    """seed of their choice"""
    repair: bool = False
    """make what is damaged again, with --teacher and --data"""
    expect_id: str | None = None
    """refuse what has another id (inspect shows it)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto takes a GPU where there is one"""
    teaching: TeacherSettings


class RunCommand(Composed):
    """What `run` takes."""

    recipe: Path | None = _by_place("[RECIPE]", default=None)
    """a TOML file of [[step]] tables, each a command with its settings; README shows how they are written and
    pipelines/ holds those of the paper's tables. Left out, a small chain on embedded digits is done"""
    data: str | None = None
    """data spec to use instead of the recipe's"""
    out: Path | None = None
    """folder of the results  [default: runs/<recipe's name>]"""
    jobs: int = Field(default=1, ge=1)
    """runs done at once, each in a process with its share of the cores; several share one GPU"""
    machine: MachineSettings


S = TypeVar("S", bound=Settings)


def make(model: type[S], values: Mapping[str, Any], source: str = "the command line") -> S:
    """Return validated settings from plain values.

    Raises:
        SettingsError: a key is unknown (names the nearest known one) or a value is out of range; says where and why.
    """
    if inner := parts(model).keys() & values.keys():
        raise SettingsError(f"unknown setting '{min(inner)}' in {source}; {nearest(min(inner), keys(model))}")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError("\n".join(_explained(model, item, source) for item in error.errors())) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's content.

    Raises:
        NotFoundError: there is no such file.
        SettingsError: the file is not TOML; gives line and column.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"no recipe at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None


def keys(model: type[BaseModel]) -> list[str]:
    """Return the names of a model's settings as recipes and flags write them (`for` is a word of Python's own)."""
    return [name.rstrip("_") for name in fields(model)]


def _explained(model: type[Settings], item: Any, source: str) -> str:
    key = ".".join(str(name) for name in item["loc"] if name not in parts(model)) or "settings"
    if item["type"] == "extra_forbidden":
        return f"unknown setting '{key}' in {source}; {nearest(key, keys(model))}"
    return f"setting '{key}' in {source}: {item['msg']}; found {item['input']!r}"
