"""A store under any sequence of writing, crashing, growing, damage and repair, held against a model in memory."""

import shutil
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from damaging import DAMAGE, files_of, place_of, put, sibling, swap
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from stores import creating, finish, form, knowledge, small_parts, values, write_part

from kcdcache.errors import KcdcacheError, UnfinishedError
from kcdcache.files.atomic import TEMPORARY_MARK
from kcdcache.store import check, log, reader, writer
from kcdcache.store.plan import plan_from
from kcdcache.store.writer import WHOLE, Shard
from kcdcache.teacher import repair

COUNT = 40
FORMS = [("float16", "none"), ("float32", "zstd"), ("top:3", "none")]
GROWTHS = {"view": {"views": 3}, "field": {"fields": [form("penultimate")]}}
UNCOMPARED = ("_kcd/lock",)


def begin(path, text, compression, shard=WHOLE):
    return creating(path, small_parts(COUNT, 2, 16, 8, text, compression), shard=shard)


@cache
def reference(text, compression, history):
    """File -> bytes of a store that nothing ever happened to, after some growths."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        with begin(path, text, compression) as writing:
            finish(writing)
        for name in history:
            with writer.grow(path, knowledge(COUNT), **GROWTHS[name]) as growing:
                finish(growing)
        return {name: (path / name).read_bytes() for name in files_of(path) if name not in UNCOMPARED}


class StoreMachine(RuleBasedStateMachine):
    """What is sealed, what is under way, and so what every file may hold; all else is damage."""

    @initialize(chosen=st.sampled_from(FORMS))
    def begin(self, chosen):
        self.text, self.compression = chosen
        self.folder = Path(tempfile.mkdtemp(prefix="machine-"))
        self.path = self.folder / "store"
        self.sealed = None
        """growths sealed so far, None before the store is"""
        self.growing = ""
        """what is being written: the store itself (''), a growth, or None"""
        with begin(self.path, self.text, self.compression):
            pass

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    # the model

    @property
    def before(self):
        return {} if self.sealed is None else reference(self.text, self.compression, self.sealed)

    @property
    def after(self):
        """What is sealed and what is under way, together."""
        if self.growing is None:
            return self.before
        history = () if self.sealed is None else (*self.sealed, self.growing)
        return reference(self.text, self.compression, history)

    @property
    def open_work(self):
        """Chunks and log records that may be there or not yet."""
        begun = set(self.after) - set(self.before)
        return {name for name in begun if "/c." in name or "/log/" in name}

    def damage(self):
        """Files that are not what they should be."""
        found = set()
        for name in self.after:
            allowed = {self.before.get(name, self.after[name])}
            if name.endswith("zarr.json"):
                allowed.add(self.after[name])
            if name in self.open_work or (name not in self.before and "commit" in name):
                allowed.add(None)
            file = self.path / name
            if (file.read_bytes() if file.is_file() else None) not in allowed:
                found.add(name)
        return found

    def disturbing(self):
        """Damage that a reader or verification of what is sealed may see."""
        return self.damage() - self.open_work

    # writing

    @contextmanager
    def writing(self, shard=WHOLE):
        if self.sealed is None:
            with begin(self.path, self.text, self.compression, shard) as made:
                yield made
        else:
            with writer.grow(self.path, knowledge(COUNT), shard=shard, **GROWTHS[self.growing]) as made:
                yield made

    @contextmanager
    def damage_may_refuse(self):
        harmed = self.damage()
        try:
            yield
        except KcdcacheError:
            assert harmed

    def seal_if_done(self):
        commit = f"_kcd/commit.{0 if self.sealed is None else len(self.sealed) + 1}.json"
        if self.growing is not None and (self.path / commit).exists():
            self.sealed = () if self.sealed is None else (*self.sealed, self.growing)
            self.growing = None

    @precondition(lambda self: self.growing is not None)
    @rule(number=st.integers(0, 99), total=st.integers(1, 3), part=st.integers(0, 99))
    def write_one_part(self, number, total, part):
        with self.damage_may_refuse(), self.writing(Shard(number % total, total)) as made:
            if pending := made.pending():
                write_part(made, pending[part % len(pending)])
            made.seal_last()
        self.seal_if_done()

    @precondition(lambda self: self.growing is not None)
    @rule()
    def resume_to_the_end(self):
        work = [name for name in self.open_work if "/c." in name]
        with self.damage_may_refuse():
            with self.writing() as made:
                finish(made)
            for name in work:  # resuming looks at records and sizes; hashes are for `verify`
                assert (self.path / name).stat().st_size == len(self.after[name])
            assert not list(self.path.rglob(f"*{TEMPORARY_MARK}*"))
        self.seal_if_done()

    @precondition(lambda self: self.growing is not None and self.open_work)
    @rule(number=st.integers(0, 99), written=st.integers(0, 4), torn=st.booleans())
    def crash_in_a_part(self, number, written, torn):
        """As SIGKILL leaves it: no record, some chunks whole, and perhaps a temporary file cut short."""
        records = sorted(name for name in self.open_work if "/log/" in name and "samples" not in name)
        record = records[number % len(records)]
        view, part = (int(text[1:]) for text in Path(record).stem.split("-"))
        chunks = [name for name in sorted(self.open_work) if self.lies_in(name, view, part)]
        put(self.path / record, None)
        for place, name in enumerate(chunks):
            put(self.path / name, self.after[name] if place < written else None)
        if torn and written < len(chunks):
            name = chunks[written]
            put(self.path / f"{name}{TEMPORARY_MARK}1-1", self.after[name][:100])

    def lies_in(self, name, view, part):
        numbers = name.split("/c.")[-1].split(".")
        chunks = "/c." in name and not name.startswith(("labels", "sample_digest"))
        return chunks and int(numbers[0]) == view and int(numbers[1]) // 2 == part

    @precondition(lambda self: self.sealed is not None and self.growing is None and len(self.sealed) < 2)
    @rule(name=st.sampled_from(sorted(GROWTHS)))
    def grow(self, name):
        if name in self.sealed or self.damage():
            return
        with writer.grow(self.path, knowledge(COUNT), **GROWTHS[name]) as growing:
            assert growing.pending()
        self.growing = name

    # damage and what mends it

    @rule(number=st.integers(0, 999), kind=st.sampled_from([*DAMAGE, "swapped"]), place=st.integers(0, 10**6))
    def corrupt(self, number, kind, place):
        files = [name for name in self.after if (self.path / name).is_file() and (self.path / name).stat().st_size]
        name = files[number % len(files)]
        data = (self.path / name).read_bytes()
        if kind != "swapped":
            put(self.path / name, DAMAGE[kind](data, place % len(data)))
        elif (other := sibling(self.path, name)) and other in self.after:
            swap(self.path, name, other)
        self.unseal_if_the_last_commit_is_gone()

    def unseal_if_the_last_commit_is_gone(self):
        """A store without its newest commit cannot be told from one that crashed before it was written."""
        if self.sealed is None or (self.path / f"_kcd/commit.{len(self.sealed)}.json").exists():
            return
        if self.growing is None:
            self.growing = self.sealed[-1] if self.sealed else ""
            self.sealed = self.sealed[:-1] if self.sealed else None
        else:  # two growths open at once: nothing could have left that
            put(self.path / f"_kcd/commit.{len(self.sealed)}.json", self.before[f"_kcd/commit.{len(self.sealed)}.json"])

    @rule()
    def put_the_right_bytes_back(self):
        for name in self.damage():
            put(self.path / name, self.before.get(name, self.after[name]))
        assert not self.damage()

    @precondition(lambda self: self.sealed is not None)
    @rule()
    def repair(self):
        try:
            repair.repair(self.path, None)
        except KcdcacheError:
            assert self.disturbing()
        else:
            assert not self.disturbing()

    # reading

    @invariant()
    def opening_gives_the_model_or_an_error(self):
        if not hasattr(self, "path"):
            return
        disturbed = self.disturbing()
        try:
            opened = reader.open(self.path)
            rows = {view: opened.load(view, np.arange(COUNT), list(opened.fields)) for view in range(opened.views)}
            labels = opened.labels
        except UnfinishedError:
            assert self.sealed is None or disturbed
            return
        except KcdcacheError:
            assert disturbed
            return
        assert self.sealed is not None
        assert opened.views == (3 if "view" in self.sealed else 2)
        assert sorted(opened.fields) == ["logits", "penultimate"][: 2 if "field" in self.sealed else 1]
        assert labels.tolist() == (np.arange(COUNT) % 7).tolist()
        for view, field in ((view, field) for view in rows for field in opened.fields):
            for name, wanted in opened.plan.encodings[field].encode(values(field, view, COUNT)).items():
                assert rows[view][name].tobytes() == wanted.tobytes()

    @rule()
    def verify(self):
        disturbed = self.disturbing()
        try:
            problems = check.verify(self.path).problems
        except KcdcacheError:
            assert disturbed or self.sealed is None
            return
        assert bool(problems) == bool(disturbed)
        if all("/c." in name for name in disturbed):
            plan = plan_from(log.read_plan(self.path, len(self.sealed)))
            for name in disturbed:
                assert any(place_of(plan, name) in problem for problem in problems)


CALM = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_a_store_is_its_model_or_an_error():
    run_state_machine_as_test(
        StoreMachine, settings=settings(max_examples=4, stateful_step_count=20, derandomize=True, **CALM)
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_store_is_its_model_or_an_error_for_longer():
    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=300, stateful_step_count=20, **CALM))
