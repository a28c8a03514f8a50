import hashlib
import inspect
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from kcdcache import settings
from kcdcache.condensation import ranking, schedule, values
from kcdcache.condensation.manifest import Samples, full
from kcdcache.errors import NotFoundError, SettingsError
from kcdcache.files.records import canonical_json
from kcdcache.methods.catalogue import weights_of
from kcdcache.networks.input_transform import InputTransform, resolve_device
from kcdcache.store import encoding, plan
from kcdcache.teacher import teacher
from kcdcache.training import batches, loop, requery
from kcdcache.views import mixing, prefetch, rules

MODELS = [
    model
    for model in vars(settings).values()
    if inspect.isclass(model) and issubclass(model, settings.Settings) and model.model_fields
]
FIELDS = [(model, name) for model in MODELS for name in settings.fields(model)]
RECORDED = "e1a78a2d648fdf24cce8ee050e212d42d25d3b1fc74dcd65e7bd3fc6b85df0a2"
"""SHA-256 of what runs of commit 5094037 record of these settings, without mix_base, which went"""
REQUIRED = {
    settings.FitCommand: {"data": "digits", "model": "resnet8", "out": "run"},
    settings.PrecomputeCommand: {"data": "digits", "store": "store"},
    settings.TrainCommand: {"out": "run"},
    settings.CondenseCommand: {"store": "store", "keep": 0.5, "out": "m"},
    settings.ExportCommand: {"manifest": "m", "store": "store", "out": "set"},
    settings.InspectCommand: {"path": "p"},
    settings.SealCommand: {"path": "p"},
    settings.DiffCommand: {"a": "a", "b": "b"},
    settings.ReportCommand: {"paths": ["a"]},
    settings.EvaluateCommand: {"data": "digits", "teacher": "n"},
    settings.EvaluatedSettings: {"teacher": "n"},
    settings.VerifyCommand: {"path": "p"},
}


def test_every_field_is_described():
    told = {(model.__name__, name): settings.fields(model)[name].description for model, name in FIELDS}
    assert [place for place, text in told.items() if not (text or "").strip()] == []


@pytest.mark.parametrize("model", MODELS)
def test_every_default_is_allowed_by_its_own_model_and_none_can_be_changed(model):
    defaults = {name: field.default for name, field in settings.fields(model).items() if not field.is_required()}
    made = settings.make(model, {**REQUIRED.get(model, {}), **defaults})
    assert made.model_dump() == settings.make(model, REQUIRED.get(model, {})).model_dump()
    name = next(iter(model.model_fields))
    with pytest.raises(ValidationError, match="Instance is frozen"):
        setattr(made, name, getattr(made, name))


@pytest.mark.parametrize("model", [*REQUIRED, settings.TrainSettings])
def test_no_message_about_a_wrong_value_names_a_type_of_ours_or_pydantics(model):
    refused = 0
    for name in settings.fields(model):
        for wrong in (-3, "\N{SNOWMAN}", [-3], {"a": 1}, float("inf")):
            try:
                settings.make(model, REQUIRED.get(model, {}) | {name.rstrip("_"): wrong})
            except SettingsError as error:
                refused += 1
                for line in str(error).split("\n"):
                    assert re.match(rf"setting '{name.rstrip('_')}_?(\.\d+)*' in the command line: [A-Z]", line), line
                    assert not re.search(r"<class|\bPath\b|constrained|literal\[|lax-or", line), line
    assert refused > len(settings.fields(model))


def test_there_is_one_default_per_setting():
    defaults = {}
    for model, name in FIELDS:
        # `fit` cycles through all views and `precompute` keeps one; a training and a teacher batch differ
        different = name in ("views", "batch_size") or model is settings.MethodsCommand
        if not different and not settings.fields(model)[name].is_required():
            defaults.setdefault(name, set()).add(repr(settings.fields(model)[name].default))
    assert {name: found for name, found in defaults.items() if len(found) > 1} == {}


CONDENSE = REQUIRED[settings.CondenseCommand]
TRAIN = REQUIRED[settings.TrainCommand]
REFUSED = [
    (settings.TrainSettings, {"tempreture": 1}, r"unknown setting 'tempreture' in x.toml; did you mean 'temperature'"),
    (settings.TrainSettings, {"eps-max": 1}, r"unknown setting 'eps-max' in x.toml; did you mean 'eps_max'\?"),
    (settings.ViewSettings, {"zzzzzz": 1}, r"unknown setting 'zzzzzz' in x.toml; known: augment, fill"),
    *((settings.TrainSettings, {key: value}, rf"setting '{key}' in x.toml: .*{rule}.*; found {value!r}")
      for key, value, rule in [
          ("keep", 0, "greater than 0"),
          ("keep", 1.5, "less than or equal to 1"),
          ("epochs", 0, "greater than or equal to 1"),
          ("epochs", 2.5, "valid integer"),
          ("momentum", 1, "less than 1"),
          ("seed", 2**64, "less than 18446744073709551616"),
          ("temperature", "hot", "valid number"),
          ("schedule", "weekly", "'end_of_stage', 'alg1_shift', 'paper_stage', 'reference_linear' or 'poster'"),
          ("milestones", "0.5", "valid tuple"),
          ("preset", "papr", "'paper' or 'release'"),
      ]),
    *((settings.TrainSettings, {key: value}, rf"setting '{key}' in x.toml: .*; found ")
      for key in ("keep", "learning_rate", "temperature", "memory_gb", "eps_max") for value in ("nan", float("inf"))),
    *((settings.CondenseCommand, CONDENSE | {"keep": keep}, "setting 'keep' in x.toml: Input should be .*; found")
      for keep in (0.0, -0.1, 1.0001, float("nan"))),
    (settings.TrainSettings, {"epocs": 1, "keep": 2}, r"(?s)'keep' .*\n.*'epocs' "),
    (settings.TrainCommand, TRAIN | {"training": 3}, r"^unknown setting 'training' in x.toml; "),
]  # fmt: skip


@pytest.mark.parametrize(("model", "values", "said"), REFUSED)
def test_what_is_unknown_or_out_of_range_is_refused_with_its_rule_and_what_was_found(model, values, said):
    with pytest.raises(SettingsError, match=said):
        settings.make(model, values, "x.toml")


@pytest.mark.parametrize(("model", "name"), FIELDS)
def test_settings_made_in_python_refuse_what_the_command_line_refuses_in_the_same_words(model, name):
    """Directly and as a copy: no setting takes a list that holds nothing at all."""
    values = REQUIRED.get(model, {}) | {name: [[None]]}
    with pytest.raises(SettingsError) as listed:
        settings.make(model, values, f"{model.__name__}(...)")
    with pytest.raises(SettingsError) as direct:
        model(**values)
    assert str(direct.value) == str(listed.value)
    assert f"setting '{name}" in str(direct.value)
    assert not re.search(r"pydantic|type=|validation error|input_value", str(direct.value))
    right = settings.make(model, REQUIRED.get(model, {}))
    with pytest.raises(SettingsError, match=f"setting '{name}.*in {model.__name__}.model_copy"):
        right.model_copy(update={name: [[None]]})


CPU, ONES = torch.device("cpu"), torch.ones(1)
PIXELS, LOGITS = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3)
RULE = settings.ViewRule(rule="crop", padding=1, fill="zero", size=(4, 4), seed=0)
WRONG_WORDS = {
    "mix": lambda: batches.Mixing(mix="convx"),
    "target": lambda: batches.Mixing(target="linear_pro"),
    "temperature": lambda: batches.Mixing(temperature=0),
    "mix of mixes": lambda: requery.Mixes(manifest=full(Samples("k", 3)), fields=("logits",), views=(0,), mix="convx"),
    "mixed pixels": lambda: mixing.mix_pixels(PIXELS, PIXELS, ONES, "convx"),
    "mixed probabilities": lambda: mixing.mix_probabilities(LOGITS, LOGITS, ONES, "requery", 4.0),
    "mix_label": lambda: replace(weights_of(settings.MethodSettings()), mix_label="kep"),
    "training": lambda: settings.TrainSettings(sampling="unx"),
    "a flag of a part": lambda: settings.FitCommand(**REQUIRED[settings.FitCommand] | {"augment": "cropp"}),
    "a view rule": lambda: rules.count(replace(RULE, rule="cropp")),
    "its fill": lambda: rules.apply(replace(RULE, fill="refelct"), PIXELS.byte(), np.zeros((1, 2), np.int64)),
    "held images": lambda: rules.HeldImages(replace(RULE, fill="refelct"), np.zeros((1, 4, 4, 3), np.uint8), CPU),
    "precision": lambda: loop.forward_precision(CPU, "bf16"),
    "teacher": lambda: teacher.freeze(torch.nn.Identity(), InputTransform((0.5,), (0.5,)), "x", ("a",), CPU, "half"),
    "device": lambda: resolve_device("gpu"),
    "resident": lambda: prefetch.wanted("yes", None, CPU),
    "eps_grid": lambda: ranking.epsilons("zero", 0.3, np.arange(3), 3),
    "schedule": lambda: schedule.plan("endstage", 6, 3, 0.5),
    "record": lambda: values.observe(np.zeros(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.float32), "avg"),
    "unseen": lambda: values.score(values.start(2), 0.0, "middle"),
    "compression": lambda: plan.plan_store(3, 1, [encoding.parse("float16", "logits", (3,))], "gzip"),
    "encoding": lambda: encoding.parse("flaot16", "logits", (3,)),
    "method": lambda: weights_of(settings.MethodSettings(method="kdd")),
}


@pytest.mark.parametrize("what", WRONG_WORDS)
def test_a_wrong_word_given_in_python_is_refused_with_those_that_are_known(what):
    """None goes on as another word, and none is a KeyError."""
    with pytest.raises(SettingsError, match=r"known: |Input should be |did you mean "):
        WRONG_WORDS[what]()


@pytest.mark.parametrize("given", [{}, {"schedule": "poster", "mix_label": "mix"}])
def test_a_preset_sets_its_readings_and_a_flag_given_beside_it_wins(given):
    for name, preset in settings.PRESETS.items():
        made = settings.make(settings.TrainSettings, {"preset": name, **given})
        expected = preset | given
        assert {key: getattr(made, key) for key in expected} == expected
    plain = settings.TrainSettings().model_dump()
    assert all(plain != plain | preset for preset in settings.PRESETS.values())


def test_a_commands_settings_are_dealt_out_to_its_parts_and_told_as_one_table():
    flat = {"keep": 0.4, "preset": "paper", "schedule": "poster", "teacher": "t", "device": "cpu", "transfer": True}
    made = settings.make(settings.TrainCommand, REQUIRED[settings.TrainCommand] | flat)
    training = {"keep": 0.4, "preset": "paper", "schedule": "poster"}
    assert made.training == settings.make(settings.TrainSettings, training)
    assert (made.teaching.teacher, made.machine.device, made.transfer) == ("t", "cpu", True)
    preset = settings.PRESETS["paper"]
    assert made.given == {*REQUIRED[settings.TrainCommand], *flat, *preset}


def test_a_preset_of_condense_reaches_its_rules():
    made = settings.make(settings.CondenseCommand, REQUIRED[settings.CondenseCommand] | {"preset": "release"})
    assert (made.rules.k0, settings.CondenseSettings().k0) == ("stage_slice", "complement")


def test_the_record_of_a_run_is_that_of_its_settings_and_nothing_else():
    """Its digest names runs: what is recorded, and under which names, never changes unseen."""
    record = settings.recorded(settings.TrainSettings(student="resnet8", kr_lambda=0.1))
    assert hashlib.sha256(canonical_json(record)).hexdigest() == RECORDED
    assert not record.keys() & settings.NEUTRAL


def test_toml_becomes_plain_values(tmp_path):
    (tmp_path / "a.toml").write_text('keep = 0.5\nmilestones = [0.5, 0.75]\n[deep]\nname = "ü"\n')
    found = settings.read_toml(tmp_path / "a.toml")
    assert found == {"keep": 0.5, "milestones": [0.5, 0.75], "deep": {"name": "ü"}}
    with pytest.raises(NotFoundError, match=r"no recipe at .*b.toml"):
        settings.read_toml(tmp_path / "b.toml")


@pytest.mark.parametrize(
    ("text", "place"),
    [(b"keep = = 1", "line 1, column 8"), (b"a = 1\nb = ?\n", "line 2, column 5"), (b"a = '\xff'", "decode byte 0xff")],
)
def test_what_is_no_toml_is_refused_with_its_place(tmp_path, text, place):
    (tmp_path / "a.toml").write_bytes(text)
    with pytest.raises(SettingsError, match=rf"a.toml is not valid TOML: .*{place}"):
        settings.read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ranking": "random", "seed": 7}, 7),
        ({"ranking": "random", "seed": 7, "condense_seed": 0}, 0),
        ({"ranking": "random"}, 0),
        ({"schedule": "paper_stage", "seed": 7}, 7),
        ({"seed": 7}, 0),
    ],
)
def test_a_run_that_draws_its_sets_draws_them_with_its_own_seed(given, expected):
    assert settings.TrainSettings(student="resnet8", **given).condense_seed == expected
