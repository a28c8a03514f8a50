"""What each command of the command line takes: its settings, its inputs and where its result goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field, model_validator

from kcdcache import partitioned
from kcdcache.config import (
    CondenseSettings,
    FitSettings,
    MachineSettings,
    PrecomputeSettings,
    Settings,
    TeacherSettings,
    TrainSettings,
    with_preset,
)


class FitCommand(FitSettings, MachineSettings):
    """Everything `kcdcache fit` takes."""

    data: str
    """data spec: digits, cifar10[:DIR], cifar100[:DIR], folder:DIR, parquet:DIR[#label], arrays:FILE.npz"""
    model: str
    """network to train"""
    out: Path
    """folder of the run"""


class PrecomputeCommand(PrecomputeSettings, TeacherSettings, MachineSettings):
    """Everything `kcdcache precompute` takes."""

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


class TrainCommand(TrainSettings, TeacherSettings, MachineSettings):
    """Everything `kcdcache train` takes."""

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


class CondenseCommand(CondenseSettings):
    """Everything `kcdcache condense` takes."""

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
    partition_rows: int = Field(default=partitioned.ROWS, ge=1)
    """write manifests of more samples than this in parts, each of so many samples"""
    memory_gb: float = Field(default=8, gt=0)
    """memory for what is kept of the samples, about 9 bytes for each; more is refused. Never changes results"""
    expect_id: tuple[str, ...] | None = None
    """ids that store, values and previous manifest must have (inspect shows them): refuse anything else"""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        return with_preset(cls, values)


class ExportCommand(Settings):
    """Everything `kcdcache export` takes."""

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


COMMANDS: Mapping[str, type[Settings]] = {
    "fit": FitCommand,
    "precompute": PrecomputeCommand,
    "train": TrainCommand,
    "condense": CondenseCommand,
    "export": ExportCommand,
}
"""command -> what it takes"""
