"""The whole chain in a bucket: the bytes of the local one, whatever breaks, dies, or goes on on another machine."""

import json
import random
from types import SimpleNamespace

import pytest
from cloud import SECRET, Proxy, Server, access, everything, forgotten
from commands import words
from killing import finished, succeeds
from pupils import SPEC, lines, promised

from kcdcache.condensation import manifest

NAMES = ("fit", "precompute", "train", "condense.parquet", "export", "reuse")
"""the chain's commands by the place of what they make"""
FAULTS = ("503", "cut", "lost", "half", "slow")


class Url(str):
    """A place in a bucket, with `/` as of paths."""

    __slots__ = ()

    def __truediv__(self, name):
        return Url(f"{self}/{name}")


def command(root, name):
    """A command with all places below `root`, a folder or a URL; what local ones left counts where `here` has it."""
    known = {
        "export": {"manifest": root / "train", "store": root / "precompute", "out": root / name, "data": SPEC},
        "reuse": {
            "condensed": root / "export", "data": f"condensed:{root / 'export'}", "out": root / name,
            "student": "lessons:TinyNet", "epochs": 1, "stages": 1, "threads": 1,
        },
    }  # fmt: skip
    if name == "export":
        return [name, *lines(known[name]), "--with-images"]
    return ["train", *lines(known[name])] if name == "reuse" else words(root, name.split(".")[0], root / name)


@pytest.fixture(scope="module")
def plain(here):
    """Place -> the promised bytes of what the chain makes there on a local disk."""
    for name in ("export", "reuse"):
        succeeds(here.start, command(here.root, name), here.root / "log")
    made = {name: promised(here.root / name) for name in NAMES if "." not in name}
    return made | {"condense.parquet": (here.root / "condense").read_bytes()}


def bucket(server, here, folder):
    """An empty bucket that has got the teacher, a proxy before it, and how to run a command there."""
    for key in server.listed():
        server.delete(key)
    server.upload(here.root / "teacher", "teacher")
    proxy = Proxy(server)
    cache, log, root = folder / "cache", folder / "log", Url(f"s3://{server.bucket}")

    def run(line, **more):
        line = command(root, line) if isinstance(line, str) else line
        return finished(here.start, line, log, **access(proxy.port, cache) | more)

    def elsewhere(name, **more):
        """Run a command as on another machine; what a killed one of the first owns is taken over by its name."""
        forgotten(cache)
        owners = [server.read(key).decode() for key in server.listed(name) if ".owner" in key.split("/")]
        return run(name, **more, **{"KCDCACHE_OWNER": owners[0]} if owners else {})

    return SimpleNamespace(server=server, proxy=proxy, cache=cache, log=log, root=root, run=run, elsewhere=elsewhere)


@pytest.fixture
def place(server, here, tmp_path):
    made = bucket(server, here, tmp_path)
    yield made
    made.proxy.close()


@pytest.fixture(scope="module")
def chain(server, here, tmp_path_factory):
    """The chain done in a bucket of its own: every command is killed once while it writes, and then goes on as on
    another machine, with an empty cache; every twentieth request goes wrong."""
    made = bucket(Server("chain", beside=server), here, tmp_path_factory.mktemp("chain"))
    made.proxy.faults = lambda method, path, number: FAULTS[number // 20 % 5] if number % 20 == 0 else None
    draw = random.Random(1)
    made.codes = []
    for name in NAMES:
        point = draw.randint(2, 5 if "." in name else 25)
        made.codes += [made.elsewhere(name, KCDCACHE_CRASHPOINT=str(point)), made.elsewhere(name)]
    made.broken = set(made.proxy.broken)
    made.proxy.faults = lambda method, path, number: None
    yield made
    made.proxy.close()


def same(place, plain, name):
    found = place.server.read(name) if "." in name else place.server.promised(name)
    differing = [] if found == plain[name] else [
        file for file in {*found, *plain[name]} if "." in name or found.get(file) != plain[name].get(file)
    ]  # fmt: skip
    assert not differing, f"{name}: {sorted(differing)} differ\n{place.log.read_text()[-2000:]}"
    return True


def there(place):
    return {key: place.server.read(key) for key in place.server.listed() if ".owner" not in key}


def test_the_chain_in_a_bucket_makes_the_bytes_of_the_local_one_whatever_breaks_or_dies(chain, plain):
    assert chain.codes == [-9, 0] * len(NAMES), chain.log.read_text()
    assert chain.broken == set(FAULTS)
    assert all(same(chain, plain, name) for name in NAMES)
    assert not [key for key in chain.server.listed() if ".tmp-" in key]


def test_finished_work_is_passed_over_and_every_command_tells_urls(chain):
    before, root = there(chain), chain.root
    chain.log.write_text("")
    told = (
        command(root, "precompute"), command(root, "train"), [*command(root, "condense.parquet"), "--dry-run"],
        ["inspect", root / "train"], ["diff", root / "train", root / "train/stages/0/manifest.parquet"],
        ["verify", root / "precompute", "--read-data"], ["verify", root / "train"], ["seal", root / "precompute"],
        ["inspect", root / "nothing"],
    )  # fmt: skip
    assert [chain.run([*line, "--json"]) for line in told] == [0] * 8 + [10], chain.log.read_text()
    assert there(chain) == before
    log = chain.log.read_text()
    for said in ("{}/precompute is already finished", "{}/train is already finished", "error: nothing at {}/nothing"):
        assert said.format(root) in log
    assert str(chain.cache) not in log


def test_neither_secrets_nor_paths_of_the_cache_are_kept_anywhere(chain):
    root = chain.root
    report = ["report", root / "train", "--out", root / "report.html", "--json-file", root / "report.json"]
    assert chain.run(report) == 0, chain.log.read_text()
    chain.proxy.faults = lambda method, path, number: "403" if method == "PUT" else None
    assert chain.run(words(root, "condense", root / "other.parquet")) == 11
    chain.proxy.faults = lambda method, path, number: None
    assert f"{root} refuses to write other.parquet" in chain.log.read_text()
    contents = there(chain)
    assert "report.html" in contents
    assert not [key for key, data in contents.items() if SECRET.encode() in data or b"/cache/s3" in data]
    for found in (chain.log.read_bytes(), everything(chain.cache)):
        assert SECRET.encode() not in found
        assert b"Signature" not in found


def test_a_set_in_parts_is_written_seal_last_and_killed_before_that_is_none(chain, here, tmp_path):
    made = chain.root / "parts.parquet"
    line = words(chain.root, "condense", made, partition_rows=64)
    for point in (3, 14, 18):
        assert chain.run(line, KCDCACHE_CRASHPOINT=str(point)) == -9, chain.log.read_text()
        forgotten(chain.cache)
        assert "parts.parquet/_parts.json" not in chain.server.listed()
    assert [chain.run(line), chain.run(line)] == [0, 0], chain.log.read_text()  # the same again is accepted
    found = [key for key in chain.server.listed("parts.parquet") if ".owner" not in key]
    names = ["_parts.json", *(f"part-{number:05}-of-00004.parquet" for number in range(4))]
    assert found == [f"parts.parquet/{name}" for name in names]
    for key in found:
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(chain.server.read(key))
    assert manifest.read(tmp_path / "parts.parquet").digest == manifest.read(here.root / "condense").digest
    chain.server.delete(found[0])
    assert chain.run(["inspect", made]) != 0
    assert chain.run(line) == 0
    assert not [key for key in chain.server.listed() if ".tmp-" in key]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_any_step_of_writing_it_ends_in_the_same_bytes_elsewhere(place, plain, name):
    """From the beginning, killed at one step, gone on with on another machine: for steps from the first to the last."""
    for other in NAMES[: NAMES.index(name)]:
        assert place.run(other) == 0
    place.proxy.faults = lambda method, path, number: ("503", "lost")[number % 2] if number % 11 == 0 else None
    draw, point, hits = random.Random(0), 1, 0
    while place.run(name, KCDCACHE_CRASHPOINT=str(point)) == -9:
        hits += 1
        assert place.elsewhere(name) == 0, place.log.read_text()
        assert same(place, plain, name)
        for key in [name] if "." in name else place.server.listed(name):
            place.server.delete(key)
        point += 1 if "." in name else draw.randint(1, 8)
    assert hits >= (5 if "." in name else 10)


RECIPE = """
title = "small"
data = "digits?train=200&test=60"
seeds = [0, 1]
[[step]]
name = "teacher"
run = "fit"
model = "resnet8"
epochs = 1
[[step]]
name = "store"
run = "precompute"
teacher = "@teacher"
views = 1
min_accuracy = 0
[[step]]
name = "kd"
run = "train"
per_seed = true
store = "@store"
student = "resnet8"
epochs = 1
stages = 1
"""


@pytest.mark.slow
def test_a_recipe_several_at_once_ends_in_a_bucket(place, tmp_path):
    (tmp_path / "small.toml").write_text(RECIPE)
    for jobs in ("2", "1"):
        line = ["run", tmp_path / "small.toml", "--out", place.root / "grid", "--jobs", jobs, "--threads", "1"]
        assert place.run(line) == 0, place.log.read_text()
    made = there(place)
    assert {"grid/results.json", "grid/report.html", "grid/kd-seed1/summary.json"} <= made.keys()
    assert not [key for key, data in made.items() if b"/cache/s3" in data]
    results = json.loads(made["grid/results.json"])
    assert [run["step"] for run in results["runs"]] == ["teacher", "store", "kd", "kd"]
