"""Frozen settings: one model per stage, one per command composed of them; from TOML and flags, unknown keys refused.

All defaults are here. The command line and recipes are built from these models: a field's docstring is its help text,
and the first line of a part's docstring is the heading of its options.
"""

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from kcdcache.errors import NotFoundError, SettingsError, nearest

Precision = Literal["float32", "bfloat16"]
Mix = Literal["convex", "additive_clip"]
MixTarget = Literal["linear_prob", "linear_logit", "keep", "requery"]
Device = Literal["auto", "cpu", "cuda"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Base class of all settings: frozen, keyword-only, finite, no unknown keys, documented by field docstrings."""

    # models are built on first use: a command needs only one of them
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
    )

    def __init__(self, /, **values: Any) -> None:
        """Check the values as the command line does; raises SettingsError for an unknown name or a wrong value."""
        with _explaining(type(self), f"{type(self).__name__}(...)"):
            super().__init__(**values)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # parts are built without it

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some other values, checked too."""
        changed, own, source = dict(update or {}), type(self).model_fields, f"{type(self).__name__}.model_copy(...)"
        for name in changed.keys() - own:
            raise SettingsError(f"unknown setting '{name}' in {source}; {nearest(name, own)}")
        with _explaining(type(self), source):
            type(self).model_validate(dict(self) | changed)
        return super().model_copy(update=changed, deep=deep)


class Composed(Settings):
    """Settings of a command: its own and those of its parts, which flags and recipes give in one flat table."""

    @property
    def given(self) -> set[str]:
        """Names of the settings given by the user, including those of the parts."""
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
    """Return the name and model of each part of a command's settings; empty for other settings."""
    if not issubclass(model, Composed):
        return {}
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Settings)}


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields that flags and recipes may set, by name: the model's own, then those of its parts."""
    inner = parts(model)
    own = {name: field for name, field in model.model_fields.items() if name not in inner}
    return own | {name: field for part in inner.values() for name, field in part.model_fields.items()}


def values_of(given: Settings) -> dict[str, Any]:
    """Return the values of all settings by name, including those of the parts."""
    inner = parts(type(given))
    own = {name: value for name, value in given if name not in inner}
    return own | {name: value for part in inner for name, value in getattr(given, part)}


class ViewSettings(Settings):
    """Augmented views; part of the store's identity."""

    augment: Literal["none", "crop", "crop-flip", "resized-crop-flip"] = "crop-flip"
    """augmentation that generates the views"""
    padding: int = Field(default=4, ge=0, le=64)
    """padding in pixels on each side before cropping"""
    fill: Literal["zero", "reflect"] = "zero"
    """padding content: zeros or the reflected image"""
    size: int | None = Field(default=None, ge=1, le=4096)
    """side of the square views in pixels; the image size if unset (required if image sizes differ)"""
    view_seed: int = Field(default=0, ge=0, lt=2**64)
    """seed of the views"""


@dataclass(frozen=True, kw_only=True)
class ViewRule:
    """Rule that generates views, as recorded in a store, see `ViewSettings`; equal rules generate equal views."""

    rule: str
    padding: int
    fill: str
    size: tuple[int, int]
    """height and width of a view in pixels"""
    seed: int
    """in [0, 2^64)"""

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.rule


class PrecomputeSettings(ViewSettings):
    """Views and teacher outputs to store."""

    views: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """cached views per sample, or 'all' views of the augmentation"""
    fields: tuple[str, ...] = ("logits",)
    """teacher outputs to store: logits, penultimate, attention, fsp, maps:STAGE, rotations, boundary"""
    encoding: str = "float16"
    """encoding of logits: float16, float32 or top:K"""
    budget_gb: float = Field(default=64, gt=0)
    """maximum size of the store in GB; a larger plan is refused before anything is written"""
    compression: Literal["none", "zstd"] = "none"
    """chunk compression; zstd saves about 15 % and halves the read rate"""
    batch_size: int = Field(default=256, ge=1)
    """teacher batch size; recorded in the store, since it affects the last bits of the outputs"""
    teacher_precision: Precision = "float32"
    """precision of the teacher's forward pass"""
    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """minimum teacher accuracy required; three times chance if unset, 0 disables the check"""
    workers: int | None = Field(default=None, ge=1)
    """threads for decoding and resizing images; --threads if unset. Does not affect results"""
    on_nonfinite: Literal["refuse", "skip"] = "refuse"
    """samples with NaN, infinite or too large outputs: refuse, or skip them in all training (at most 1 % of samples)"""


OPTIMIZER_PRESETS: dict[str, dict[str, Any]] = {"adamw": {"learning_rate": 1e-3, "weight_decay": 1e-2}}
"""defaults that an optimizer changes: those of torch.optim.AdamW"""


class OptimizerSettings(Settings):
    """Optimizer; defaults are the CIFAR recipe of CRD/RepDistiller, as in the paper."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """optimizer; adamw sets --learning-rate 0.001 and --weight-decay 0.01 (torch's defaults) unless they are given"""
    epochs: int = Field(default=240, ge=1)
    """total number of epochs"""
    batch_size: int = Field(default=64, ge=1)
    """batch size; a single sample left over at the end of an epoch joins the batch before it"""
    learning_rate: float = Field(default=0.05, gt=0)
    """initial learning rate; if unset, `train` uses the method's (0.01 for MobileNetV2 and ShuffleNets)"""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD momentum"""
    nesterov: bool = False
    """Nesterov momentum"""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    """adamw: decay rates of the averages of gradient and squared gradient"""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """adamw: term added to the denominator"""
    weight_decay: float = Field(default=5e-4, ge=0)
    """weight decay; of SGD added to the gradient, of AdamW decoupled from it"""
    decay_norms: bool = True
    """apply weight decay to norms and biases (parameters of at most one dimension) too"""
    clip_norm: float | None = Field(default=None, gt=0)
    """maximum norm of the gradient of all trained parameters together; no clipping if unset"""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """keep an exponential moving average of the weights with this decay per step, at most (1+n)/(10+n) at step n;
    evaluated in every row and saved in the folder `ema` of the run"""
    decay: Literal["milestones", "cosine", "constant"] = "milestones"
    """learning rate schedule"""
    milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.625, 0.75, 0.875)
    """learning rate drops, as fractions of all epochs in (0, 1): 0.625 of 240 epochs is epoch 150"""
    decay_factor: float = Field(default=0.1, gt=0, le=1)
    """factor of each drop"""
    warmup_epochs: float = Field(default=0, ge=0)
    """epochs of linear learning rate warm-up"""
    clock: Literal["epochs", "samples"] = "epochs"
    """progress used by the schedule: epochs (as in the paper's code), or the fraction of samples processed"""
    precision: Precision = "float32"
    """precision of the forward pass: float32, or bfloat16 autocast"""
    label_smoothing: float = Field(default=0, ge=0, lt=1)
    """label smoothing of the hard-label cross-entropy"""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """seed of initial weights and sample order"""
    evaluate_every: int = Field(default=1, ge=1)
    """epochs between evaluations on the test split; the last epoch is always evaluated"""
    log: tuple[Literal["csv", "tensorboard"], ...] = ()
    """log every epoch for other tools into the run folder: csv (metrics.csv), tensorboard (extra `tensorboard`), or
    both. Does not affect results"""
    checkpoint_seconds: float = Field(default=60, ge=0)
    """minimum seconds between checkpoints within an epoch. Does not affect results"""
    resident: Literal["auto", "on", "off"] = "auto"
    """keep images and knowledge on the device; auto: on a GPU, if they take at most half of its free memory"""
    workers: int | None = Field(default=None, ge=1)
    """threads for decoding and resizing images; --threads if unset. Does not affect results"""
    graphs: bool = True
    """with resident data on a GPU, replay each full step as one CUDA graph"""
    compile: bool = False
    """use torch.compile (needs a C++ compiler); affects the last bits"""
    sync_bn: bool = False
    """synchronise batch normalisation over all processes under torchrun on GPUs"""

    @model_validator(mode="before")
    @classmethod
    def _complete_optimizer(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return OPTIMIZER_PRESETS.get(str(values.get("optimizer")), {}) | dict(values)


class FitSettings(OptimizerSettings, ViewSettings):
    """Training on hard labels."""

    views: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """number of augmented views to cycle through, or 'all'"""


class MethodSettings(Settings):
    """Distillation method, targets and values."""

    method: str = "kd"
    """distillation method (see `kcdcache methods`), or a sum: kd+at, or with weights kd*0.5+at*500"""
    gamma: float | None = Field(default=None, ge=0)
    """weight of the hard-label cross-entropy; the method's default if unset (kd: 0.1)"""
    alpha: float | None = Field(default=None, ge=0)
    """weight of the soft-label term T^2 KL; the method's default if unset (kd: 0.9)"""
    beta: float | None = Field(default=None, ge=0)
    """weight of the method's own term; the method's default if unset (at: 1000)"""
    temperature: float | None = Field(default=None, gt=0)
    """distillation temperature; the method's default if unset (kd: 4)"""
    mix: Mix = "convex"
    """mixing of K_Aug images: (1-eps) x + eps x0, or x + eps x0 clipped to [0, 1]"""
    mix_target: MixTarget = "linear_prob"
    """teacher target of mixed samples: mixed probabilities or logits, the kept sample's, or the teacher on the mix"""
    mix_label: Literal["keep", "mix"] = "keep"
    """hard label of a mixed sample: the kept sample's, or mixed in the same proportion"""
    observed: Literal["entropy", "loss"] = "entropy"
    """quantity recorded per sample: entropy of the student's prediction (Eq. 7), or its loss"""
    record_mixed: bool = True
    """record values of mixed samples for the kept sample"""
    record: Literal["mean", "last", "ema"] = "mean"
    """value of a sample: running mean over all visits (Eq. 12), last observation, or exponential moving average"""
    record_decay: float = Field(default=0.9, ge=0, lt=1)
    """decay of the exponential moving average"""
    crd_negatives: int = Field(default=16384, ge=1)
    """crd, wcord: negatives per sample, drawn from other classes"""
    crd_bank: Literal["whole", "kept"] = "whole"
    """crd, wcord: draw negatives from the whole training split, or only from the stage's kept samples"""
    kr_lambda: float = Field(default=0.05, ge=0)
    """kr: tolerance on the difference of log probabilities; 0 is plain matching"""
    kr_temperature: float | None = Field(default=None, gt=0)
    """kr: temperature of the softmax; 0.1 for filter norms, 1 for pooled channels if unset"""
    kr_schedule: Literal["linear", "constant"] = "linear"
    """kr: weight decays linearly over all epochs, or is constant"""
    peer: str = ""
    """dml: peer network; the student's architecture if unset"""


class ScheduleSettings(Settings):
    """Keep schedule."""

    keep: float = Field(default=0.7, gt=0, le=1)
    """keep ratio rho: fraction of all samples in the final condensed set"""
    stages: int = Field(default=6, ge=1)
    """number of stages; must divide epochs. If unset, the divisor of epochs that is nearest to 6"""
    schedule: Literal["end_of_stage", "alg1_shift", "paper_stage", "reference_linear", "poster"] = "end_of_stage"
    """when and how fast the condensed set shrinks"""


class CondenseSettings(Settings):
    """Condensation; each choice is a reading of the paper."""

    k0: Literal["complement", "stage_slice"] = "complement"
    """dropped samples used for mixing: all, or only those ranked just below the cut"""
    candidates: Literal["global", "current"] = "global"
    """candidates: all samples (dropped ones can return), or only the current condensed set"""
    eps_grid: Literal["zero_based", "one_based", "inclusive", "constant"] = "zero_based"
    """mixing coefficient by rank: eps_max times i/L, (i+1)/L, i/(L-1), or 1"""
    eps_max: float = Field(default=0.3, ge=0, le=1)
    """maximum mixing coefficient of a dropped sample"""
    augment_kept: bool = True
    """mix dropped samples into the lowest-ranked kept ones (VAKS); off is direct selection"""
    ranking: Literal["value", "random"] = "value"
    """rank by value, or at random as a control"""
    cost_exponent: float = Field(default=0.03, ge=0)
    """alpha of Eq. 13: score = value * visits^alpha; 0 disables cost-aware ranking"""
    unseen: Literal["first", "last"] = "first"
    """rank of samples that were never visited"""
    stratify: bool = False
    """keep the same fraction of every class"""
    condense_seed: int = Field(default=0, ge=0, lt=2**64)
    """seed of random rankings and random first sets; the run's --seed by default if it draws any"""


class SamplingSettings(Settings):
    """Sampling of the condensed set in each epoch."""

    sampling: Literal["all", "random_per_epoch", "random_fixed", "infobatch", "unix"] = "all"
    """samples of an epoch: all, a random subset per epoch (RS2) or per run, InfoBatch pruning, or UNIX mixing"""
    sample_share: float = Field(default=0.75, gt=0, le=1)
    """random_per_epoch, random_fixed, unix: fraction of the condensed set used per epoch"""
    prune_probability: float = Field(default=0.5, ge=0, lt=1)
    """infobatch: probability of skipping a sample with less than the mean loss"""
    prune_until: float = Field(default=0.875, ge=0, le=1)
    """infobatch: fraction of epochs after which nothing is skipped"""
    unix_clear: float = Field(default=0.5, gt=0, le=1)
    """unix: fraction of a pool, the most uncertain samples, that is mixed least (b / 64 in its release)"""
    unix_slope: float = Field(default=10, gt=0)
    """unix: slope of the mixing coefficient over certainty (w in its release)"""


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"schedule": "alg1_shift", "k0": "complement", "candidates": "global", "eps_grid": "zero_based",
              "mix": "convex", "mix_label": "keep", "mix_target": "linear_prob"},
    "release": {"schedule": "reference_linear", "k0": "stage_slice", "candidates": "global", "eps_grid": "zero_based",
                "mix": "convex", "mix_label": "keep", "mix_target": "requery"},
}  # fmt: skip
"""Settings of each preset.

`release` does not reproduce the images of the released code: that overwrites the data with its mixes (truncated to
bytes) at every stage, so that from stage 2 on 39-66 % of the partners are mixes. Here each stage mixes original images.
"""
SAMPLING_PRESETS: dict[str, dict[str, Any]] = {"infobatch": {"observed": "loss", "record": "last", "keep": 1.0}}
"""defaults that a sampling changes: InfoBatch scores by the last loss and does not condense"""


def with_presets(model: type[BaseModel], values: Any) -> Any:
    """Return raw values, completed by those of their preset and sampling as far as the model has these settings."""
    if not isinstance(values, Mapping):
        return values
    chosen = SAMPLING_PRESETS.get(str(values.get("sampling")), {}) | PRESETS.get(str(values.get("preset")), {})
    return {key: value for key, value in chosen.items() if key in fields(model)} | dict(values)


class TrainSettings(OptimizerSettings, MethodSettings, ScheduleSettings, CondenseSettings, SamplingSettings):
    """Student."""

    student: str = ""
    """student network"""
    preset: Literal["paper", "release"] | None = None
    """settings of the paper or of the released code (without mixing mixes again); other flags take precedence"""
    cached_views: int | None = Field(default=None, ge=1)
    """use only the first N views of the store; all if unset"""
    fidelity: Literal["auto", "on", "off"] = "auto"
    """evaluate the final student on the training split, and its agreement with the teacher (on the test split too with
    --teacher); auto: if the data spec corrupts labels or classes. Finished runs are evaluated too"""
    memory_gb: float = Field(default=8, gt=0)
    """memory for decoded knowledge in GB; a memory-mapped file is used beyond. Does not affect results"""

    @model_validator(mode="before")
    @classmethod
    def _apply_presets(cls, values: Any) -> Any:
        found = with_presets(cls, values)
        if isinstance(found, dict) and "seed" in found:
            draws = found.get("ranking") == "random" or found.get("schedule") == "paper_stage"
            return ({"condense_seed": found["seed"]} if draws else {}) | found  # other seeds draw other sets
        return found


NEUTRAL = {"log", "checkpoint_seconds", "memory_gb", "resident", "graphs", "workers", "fidelity"}
"""settings that do not affect results and may change when a run continues"""
OF_OPTIMIZER = {"sgd": {"momentum", "nesterov"}, "adamw": {"adam_betas", "adam_epsilon"}}
"""settings that do nothing with another optimizer"""
SINCE_RECORDS = (
    "kr_lambda", "kr_temperature", "kr_schedule", "optimizer", "adam_betas", "adam_epsilon", "decay_norms", "clip_norm",
    "ema_decay",
)  # fmt: skip
"""settings added later: left out of records at their defaults, so that older runs can continue"""


def recorded(settings: OptimizerSettings) -> dict[str, Any]:
    """Return the settings that run.json records: all that affect results."""
    fields = type(settings).model_fields
    idle = {name for name in SINCE_RECORDS if name in fields and getattr(settings, name) == fields[name].default}
    others = set().union(*(names for name, names in OF_OPTIMIZER.items() if name != settings.optimizer))
    return settings.model_dump(mode="json", exclude=NEUTRAL | idle | others)


class MachineSettings(Settings):
    """Device and threads."""

    device: Device = "auto"
    """device; auto uses a GPU if there is one"""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores if unset. Affects the last bits of training results"""
    allow_env_change: bool = False
    """continue a run on another device, thread count or version; recorded in run.json"""


STATISTICS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "pytorch-cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "mnist": ((0.1307,), (0.3081,)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5,), (0.5,)),
    "unit": ((0.0,), (1.0,)),
}
"""name -> mean and std per channel of pixels in [0, 1]; a single number counts for every channel.

Sources: imagenet as in torchvision's presets; cifar10 and cifar100 are the pixel statistics of their training splits
(cifar100 as in RepDistiller); pytorch-cifar has the std of kuangliu/pytorch-cifar, a mean of each image's own, which
chenyaofo/pytorch-cifar-models takes for CIFAR-10, too; mnist as in torch's examples; clip as in openai/CLIP; half is
that of inception, and of many vision transformers in timm; unit leaves pixels in [0, 1].
"""


def statistics_by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `teacher_mean` and `teacher_std` as numbers where they are known names; std follows mean unless given.

    >>> statistics_by_name({"teacher_mean": "half"})
    {'teacher_mean': (0.5,), 'teacher_std': (0.5,)}
    """
    names = {key: _named(values.get(key)) for key in ("teacher_mean", "teacher_std")}
    if names["teacher_std"] is None and values.get("teacher_std") is None:
        names["teacher_std"] = names["teacher_mean"]
    known = [(key, place, name) for place, (key, name) in enumerate(names.items()) if name in STATISTICS]
    return {key: STATISTICS[name][place] for key, place, name in known if name is not None}


def _named(value: Any) -> str | None:
    """Return the name in a setting that is one, and None for numbers."""
    one = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
    try:
        float(one)
    except ValueError:
        return str(one)
    except TypeError:
        pass
    return None


class TeacherSettings(Settings):
    """Teacher."""

    teacher: str | None = None
    """folder written by `fit` or `train`, or name of a network, with --weights"""
    weights: Path | None = None
    """weights of a named teacher: safetensors, or a torch file that loads with weights_only"""
    weights_key: str | None = None
    """which weights to take of a file that has several, such as model_ema, or the prefix of their names"""
    teacher_mean: tuple[float, ...] | None = None
    """input mean per channel of a named teacher: numbers, or a name (imagenet, cifar10, cifar100, pytorch-cifar, mnist,
    clip, half, unit); that of the data if unset"""
    teacher_std: tuple[float, ...] | None = None
    """input standard deviation per channel of a named teacher, as the mean; unset, that of the name given as
    --teacher-mean, or else of the data"""
    teacher_size: int | None = Field(default=None, ge=1)
    """input size of a named teacher in pixels; views are resized to it"""

    @field_validator("teacher_mean", "teacher_std", mode="before")
    @classmethod
    def _require_statistics(cls, value: Any) -> Any:
        if (name := _named(value)) is not None:
            known = nearest(name, STATISTICS)
            raise ValueError(f"No statistics of this name; {known} (or numbers, one per channel: 0.485,0.456,0.406)")
        return value

    @model_validator(mode="before")
    @classmethod
    def _statistics_by_name(cls, values: Any) -> Any:
        return {**values, **statistics_by_name(values)} if isinstance(values, Mapping) else values


PART_ROWS = 2**24
"""default number of samples per part of a manifest, about 100 MB"""


class FitCommand(Composed):
    """Settings of `fit`."""

    data: str
    """data spec: digits, cifar10[:DIR], cifar100[:DIR], folder:DIR, parquet:DIR[#label], arrays:FILE.npz"""
    model: str
    """network to train"""
    out: Path
    """run folder"""
    machine: MachineSettings
    training: FitSettings


class PrecomputeCommand(Composed):
    """Settings of `precompute`."""

    data: str
    """data spec, as for fit"""
    store: Path
    """store folder"""
    for_: str | None = Field(default=None, validation_alias=AliasChoices("for_", "for"))
    """store the fields that this method (or several: kd+at) needs for --student, instead of --fields"""
    student: str = ""
    """student network, for --for"""
    manifest: Path | None = None
    """run the teacher on the mixed samples of this manifest and store the outputs next to it"""
    mix: Mix = "convex"
    """mixing of the manifest's images, as for train"""
    from_logits: Path | None = None
    """import logits computed elsewhere: an .npy file of shape (views, N, C) or (N, C)"""
    from_probabilities: Path | bool | None = None
    """the outputs of the teacher, or of the imported file, are probabilities: store their logarithm. With a PATH,
    import them like --from-logits"""
    shard: str | None = None
    """write shard I/N of the store, such as 0/4, or with auto the place that torchrun, srun or a SLURM array gave; the
    last process seals. By default the place of torchrun, otherwise the whole store"""
    machine: MachineSettings
    teaching: TeacherSettings
    precompute: PrecomputeSettings

    @property
    def imported(self) -> Path | None:
        """The file whose outputs are stored instead of a teacher's."""
        return self.from_probabilities if isinstance(self.from_probabilities, Path) else self.from_logits


class TrainCommand(Composed):
    """Settings of `train`."""

    store: Path | None = None
    """store folder; required unless --condensed is given"""
    data: str | None = None
    """data spec, as for precompute; with --condensed, the images of the exported set if unset"""
    out: Path
    """run folder"""
    manifest: Path | None = None
    """condensed set to start from: a manifest, or the folder of a finished run for its last one"""
    condensed: Path | None = None
    """exported set to train on, instead of --store and --manifest; not condensed further unless --stages is given"""
    transfer: bool = False
    """accept a manifest made for another teacher's store of the same data"""
    until: int | None = Field(default=None, ge=1)
    """stop after this many epochs; the same command resumes"""
    expect_id: tuple[str, ...] | None = None
    """required ids of store and condensed set (see inspect)"""
    machine: MachineSettings
    teaching: TeacherSettings
    training: TrainSettings


class CondenseCommand(Composed):
    """Settings of `condense`."""

    values: Path | None = None
    """values: a run's values.parquet, any parquet file with columns index and value, or a folder or pattern of them"""
    run: Path | None = None
    """run folder, instead of --values, --previous and --stage: its last values, and the set they were updated on"""
    store: Path
    """store folder of the values"""
    keep: float = Field(gt=0, le=1)
    """fraction of all samples to keep"""
    out: Path
    """manifest to write: a parquet file, or a folder of them for more samples than --partition-rows"""
    previous: Path | None = None
    """manifest on which the values were last updated; all samples if unset"""
    preset: Literal["paper", "release"] | None = None
    """settings of the paper or of the released code; other flags take precedence"""
    stage: int | None = Field(default=None, ge=0)
    """stage of the manifest; that of --previous plus one if unset"""
    partition_rows: int = Field(default=PART_ROWS, ge=1)
    """maximum number of samples per file; larger manifests are split"""
    memory_gb: float = Field(default=8, gt=0)
    """memory in GB, at about 9 bytes per sample (33 for random or stratified rankings); DuckDB with files next to --out
    is used beyond (extra `large`). Does not affect results"""
    expect_id: tuple[str, ...] | None = None
    """required ids of store, values and previous manifest (see inspect)"""
    rules: CondenseSettings

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return with_presets(cls, values)


class ExportCommand(Settings):
    """Settings of `export`."""

    manifest: Path
    """manifest to export, or the folder of a finished run for its last one"""
    store: Path
    """store folder of the manifest"""
    out: Path
    """folder of the exported set"""
    data: str | None = None
    """data spec of the store; required for --with-images, otherwise only checked"""
    with_images: bool = False
    """include the images of kept samples, partners and the test split, so that training needs no other data"""
    views: int | None = Field(default=None, ge=1)
    """export only the first N cached views; all if unset"""
    bake: bool = False
    """store mixed targets at one --temperature instead of the outputs of both samples; for kd only"""
    temperature: float | None = Field(default=None, gt=0)
    """distillation temperature of baked targets"""
    mix_target: Literal["linear_prob", "linear_logit", "keep"] = "linear_prob"
    """mixing of baked targets, as for train"""
    mix: Mix = "convex"
    """mixing of images of baked targets, as for train"""
    compression: Literal["none", "zstd"] = "none"
    """chunk compression; zstd saves about 15 % and halves the read rate"""
    license: str = "unknown"
    """licence in the dataset card, by its Hugging Face identifier such as cc-by-4.0"""
    expect_id: tuple[str, ...] | None = None
    """required ids of store and condensed set (see inspect)"""


def _by_place(metavar: str, **more: Any) -> Any:
    """Return the field of a positional argument."""
    return Field(json_schema_extra={"argument": metavar}, **more)


class SealCommand(Settings):
    """Settings of `seal`."""

    path: Path = _by_place("PATH")
    """a store folder"""


class InspectCommand(Settings):
    """Settings of `inspect`."""

    path: Path = _by_place("PATH")
    """a store, manifest, values file, run, exported set or network"""
    toml: bool = False
    """print the settings of a run as a file for --config"""


class EvaluatedSettings(TeacherSettings):
    """Network."""

    teacher: str = _by_place("NETWORK")
    """folder written by `fit` or `train`, a saved network (.json), or the name of a network, with --weights"""


class EvaluateCommand(Composed):
    """Settings of `evaluate`."""

    data: str
    """data spec, as for fit"""
    store: Path | None = None
    """store of this data: also compare with the teacher's outputs on view 0 of the training samples"""
    splits: tuple[Literal["test", "train"], ...] = Field(default=("test", "train"), min_length=1)
    """splits to evaluate, without augmentation"""
    size: int | None = Field(default=None, ge=1, le=4096)
    """side of the square views in pixels; by default that of the network's training views, or of the images"""
    batch_size: int = Field(default=512, ge=1)
    """images per forward pass; affects the last bits of the outputs"""
    device: Device = "auto"
    """device; auto uses a GPU if there is one"""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads; all cores if unset. Affects the last bits of the outputs"""
    network: EvaluatedSettings


class DiffCommand(Settings):
    """Settings of `diff`."""

    a: Path = _by_place("A")
    """a manifest, run or exported set"""
    b: Path = _by_place("B")
    """the one to compare it with"""


class MethodsCommand(Settings):
    """Settings of `methods`."""

    teacher: str = "wrn_40_2"
    """teacher network"""
    student: str = "wrn_16_2"
    """student network"""
    classes: int = Field(default=100, ge=2)
    """number of classes"""
    size: int = Field(default=32, ge=1)
    """side of the views in pixels"""
    encoding: str = "float16"
    """encoding of logits, as for precompute"""


class ReportCommand(Settings):
    """Settings of `report`."""

    paths: tuple[Path, ...] = _by_place("RUN_OR_FOLDER...", min_length=1)
    """a run folder, or a folder of runs such as a recipe's --out"""
    out: Path | None = None
    """HTML file, replaced if it exists  [default: report.html in the given folder]"""
    data: str | None = None
    """data spec for the images; the recipe's if unset"""
    reference: str | None = None
    """row to compare the others with  [default: kd, or the first one trained]"""
    across: bool = False
    """compare also rows of unequal data, epochs or batch size"""
    json_file: Path | None = None
    """JSON file for all numbers of the report"""
    csv: Path | None = None
    """folder for CSV files, one per table"""


class VerifyCommand(Composed):
    """Settings of `verify`."""

    path: Path = _by_place("PATH")
    """a store, manifest, values file, run, exported set or network"""
    read_data: bool = False
    """also read and hash all chunk files of a store"""
    sample: str | None = None
    """also read and hash this fraction of the chunk files, such as 5%"""
    data: str | None = None
    """data spec; check that the store was made from this data"""
    points: int = 512
    """minimum number of samples to recompute with --teacher and --data"""
    sample_seed: int = 0
    """seed that selects samples and chunk files"""
    repair: bool = False
    """repair a damaged store, with --teacher and --data"""
    expect_id: str | None = None
    """required id (see inspect)"""
    device: Device = "auto"
    """device; auto uses a GPU if there is one"""
    teaching: TeacherSettings


class RunCommand(Composed):
    """Settings of `run`."""

    recipe: Path | None = _by_place("[RECIPE]", default=None)
    """a TOML file of [[step]] tables, each a command with its settings (see the README and pipelines/); by default a
    small example on digits"""
    data: str | None = None
    """data spec to use instead of the recipe's"""
    out: Path | None = None
    """folder of the results  [default: runs/<recipe's name>]"""
    jobs: int = Field(default=1, ge=1)
    """number of parallel runs, each a process with its share of the cores; they share the GPU"""
    machine: MachineSettings


S = TypeVar("S", bound=Settings)


def make(model: type[S], values: Mapping[str, Any], source: str = "the command line") -> S:
    """Return validated settings from plain values; raises SettingsError for an unknown key or a value out of range."""
    if inner := parts(model).keys() & values.keys():
        raise SettingsError(f"unknown setting '{min(inner)}' in {source}; {nearest(min(inner), keys(model))}")
    with _explaining(model, source):
        return model.model_validate(dict(values))


def read_toml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """Return the content of a TOML file; raises NotFoundError if it is missing, SettingsError if it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"no {what} at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None


def keys(model: type[BaseModel]) -> list[str]:
    """Return the names of a model's settings as in recipes and flags (`for`, not `for_`)."""
    return [name.rstrip("_") for name in fields(model)]


@contextmanager
def _explaining(model: type[Settings], source: str) -> Iterator[None]:
    """Raise SettingsError with what is wrong, in our words, in place of pydantic's error."""
    try:
        yield
    except ValidationError as error:
        raise SettingsError("\n".join(_explained(model, item, source) for item in error.errors())) from None


def _explained(model: type[Settings], item: Any, source: str) -> str:
    names = [name for name in item["loc"] if name not in parts(model)]
    kind = fields(model)[names[0]].annotation if names and names[0] in fields(model) else None
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):  # what follows are places in a list, or types
        names = [*names[:1], *(name for name in names[1:] if isinstance(name, int))]
    key = ".".join(map(str, names)) or "settings"
    if item["type"] == "extra_forbidden":
        return f"unknown setting '{key}' in {source}; {nearest(key, keys(model))}"
    said = item["msg"].removeprefix("Value error, ").partition(" for <")[0]
    return f"setting '{key}' in {source}: {said}; found {item['input']!r}"
