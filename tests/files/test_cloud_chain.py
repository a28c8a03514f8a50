"""The whole chain in a bucket: the bytes of the local one, whatever breaks, dies, or goes on on another machine."""

import json
import random
import re
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from cloud import SECRET, Proxy, Server, access, everything, forgotten
from killing import Cold, finished, nursery
from pupils import SPEC, digits, lines, promised, saved_teacher

CROPS = {"augment": "crop", "padding": 2}
STORE = CROPS | {"views": 3, "batch_size": 64, "min_accuracy": 0, "fields": "logits,penultimate"}
TRAIN = {"student": "lessons:TinyNet", "epochs": 2, "stages": 2, "batch_size": 64, "keep": 0.6, "checkpoint_seconds": 0}
THREADS = {"threads": 1}
RESULTS = {
    "fit": "fitted",
    "precompute": "store",
    "train": "run",
    "condense": "made.parquet",
    "export": "set",
    "reuse": "again",
}
"""step of the chain -> what it makes"""
TAKE_OVER = r"set (KCDCACHE_OWNER)=(\S+) in the environment to take over"
FAULTS = ("503", "cut", "lost", "half", "slow")


def steps(base):
    """The chain's commands with all places below `base`, a folder or a URL."""
    at = {name: f"{base}/{place}" for name, place in RESULTS.items()}
    values = {"values": f"{at['train']}/values.parquet", "previous": f"{at['train']}/stages/1/manifest.parquet"}
    reuse = {"condensed": at["export"], "data": f"condensed:{at['export']}", "out": at["reuse"]}
    fit = {"data": SPEC, "model": "lessons:TinyNet", "epochs": 1, "batch_size": 64, "checkpoint_seconds": 0}
    given = {
        "fit": fit | CROPS | THREADS | {"out": at["fit"]},
        "precompute": {"data": SPEC, "teacher": f"{base}/teacher", "store": at["precompute"]} | STORE | THREADS,
        "train": {"data": SPEC, "store": at["precompute"], "out": at["train"]} | TRAIN | THREADS,
        "condense": values | {"store": at["precompute"], "keep": 0.5, "out": at["condense"]},
        "export": {"manifest": at["train"], "store": at["precompute"], "out": at["export"], "data": SPEC},
        "reuse": reuse | TRAIN | THREADS | {"epochs": 1, "stages": 1},
    }
    words = {name: ["train" if name == "reuse" else name, *lines(flags)] for name, flags in given.items()}
    words["export"].append("--with-images")
    return words


@pytest.fixture(scope="module")
def start():
    with nursery() as starting:
        yield starting


@pytest.fixture(scope="module")
def plain(tmp_path_factory, start):
    """The chain on a local disk: its root, and name -> the promised bytes of each result."""
    root = tmp_path_factory.mktemp("plain")
    saved_teacher(root / "teacher", digits(200, 60))
    for words in steps(root).values():
        assert finished(start, words, root / "log") == 0, (root / "log").read_text()
    made = {name: promised(root / place) for name, place in RESULTS.items() if name != "condense"}
    return SimpleNamespace(root=root, made=made | {"condense": (root / RESULTS["condense"]).read_bytes()})


@pytest.fixture(scope="module")
def server():
    one = Server()
    yield one
    one.close()


def bucket(server, plain, start, folder):
    """An empty bucket that has got the teacher, a proxy before it, and how to run a step there."""
    for key in server.listed():
        server.delete(key)
    server.upload(plain.root / "teacher", "teacher")
    proxy = Proxy(server)
    cache, log = folder / "cache", folder / "log"
    commands = steps("s3://bucket")

    def run(words, **more):
        words = commands[words] if isinstance(words, str) else words
        return finished(start, words, log, **access(proxy.port, cache) | more)

    def taking(words, **more):
        """Run a command: what a killed one of another machine owns is taken over, as the error says."""
        log.write_text("")
        code = run(words, **more)
        told = re.search(TAKE_OVER, log.read_text())
        assert (code == 6) == (told is not None), log.read_text()
        return code if told is None else run(words, **more | {told[1]: told[2]})

    def elsewhere(words, **more):
        """Run a command as on another machine."""
        forgotten(cache)
        return taking(words, **more)

    return SimpleNamespace(
        server=server, proxy=proxy, cache=cache, log=log, commands=commands, run=run, taking=taking, elsewhere=elsewhere
    )


@pytest.fixture
def place(server, plain, start, tmp_path):
    made = bucket(server, plain, start, tmp_path)
    yield made
    made.proxy.close()


@pytest.fixture(scope="module")
def chain(plain, start, tmp_path_factory):
    """The chain done in a bucket of its own: every command is killed once while it writes, and then goes on as on
    another machine, with an empty cache; every ninth request goes wrong."""
    own = Server()
    made = bucket(own, plain, start, tmp_path_factory.mktemp("chain"))
    made.proxy.faults = lambda method, path, number: FAULTS[number // 9 % 5] if number % 9 == 0 else None
    draw = random.Random(1)
    made.codes = []
    for name in RESULTS:
        point = draw.randint(2, 5 if name == "condense" else 25)
        made.codes.append(made.elsewhere(name, KCDCACHE_CRASHPOINT=str(point)))
        made.codes.append(made.elsewhere(name))
    made.broken = set(made.proxy.broken)
    made.proxy.faults = lambda method, path, number: None
    yield made
    made.proxy.close()
    own.close()


def same(place, plain, name):
    if name == "condense":
        assert place.server.read(RESULTS[name]) == plain.made[name]
        return True
    found = place.server.promised(RESULTS[name])
    differing = [file for file in {*found, *plain.made[name]} if found.get(file) != plain.made[name].get(file)]
    assert not differing, f"{name}: {sorted(differing)} differ\n{place.log.read_text()[-2000:]}"
    return True


def test_the_chain_in_a_bucket_makes_the_bytes_of_the_local_one_whatever_breaks_or_dies(chain, plain):
    assert chain.codes == [-9, 0] * len(RESULTS), chain.log.read_text()
    assert chain.broken == set(FAULTS)
    assert all(same(chain, plain, name) for name in RESULTS)
    assert not [key for key in chain.server.listed() if ".tmp-" in key]


def test_finished_work_is_passed_over_and_every_command_tells_urls(chain):
    before = {key: chain.server.read(key) for key in chain.server.listed() if ".owner" not in key}
    chain.log.write_text("")
    told = (
        chain.commands["precompute"], chain.commands["train"], [*chain.commands["condense"], "--dry-run"],
        ["inspect", "s3://bucket/run"], ["diff", "s3://bucket/run", "s3://bucket/run/stages/0/manifest.parquet"],
        ["verify", "s3://bucket/store", "--read-data"], ["verify", "s3://bucket/run"], ["seal", "s3://bucket/store"],
        ["inspect", "s3://bucket/nothing"],
    )  # fmt: skip
    codes = [chain.run([*words, "--json"]) for words in told]
    assert codes == [0] * 8 + [10], chain.log.read_text()
    assert {key: chain.server.read(key) for key in chain.server.listed() if ".owner" not in key} == before
    log = chain.log.read_text()
    assert "s3://bucket/store is finished already" in log
    assert "s3://bucket/run is finished already" in log
    assert "error: nothing at s3://bucket/nothing" in log
    assert str(chain.cache) not in log


def test_neither_secrets_nor_paths_of_the_cache_are_kept_anywhere(chain):
    report = ["report", "s3://bucket/run", "--out", "s3://bucket/report.html", "--json-file", "s3://bucket/report.json"]
    assert chain.run(report) == 0, chain.log.read_text()
    chain.proxy.faults = lambda method, path, number: "403" if method == "PUT" else None
    assert chain.run(["condense", *chain.commands["condense"][1:-2], "--out", "s3://bucket/other.parquet"]) == 11
    chain.proxy.faults = lambda method, path, number: None
    assert "s3://bucket refuses to write other.parquet" in chain.log.read_text()
    contents = {key: chain.server.read(key) for key in chain.server.listed()}
    assert "report.html" in contents
    assert not [key for key, data in contents.items() if SECRET.encode() in data or b"/cache/s3" in data]
    for found in (chain.log.read_bytes(), everything(chain.cache)):
        assert SECRET.encode() not in found
        assert b"Signature" not in found


def test_a_set_in_parts_is_written_seal_last_and_killed_before_that_is_none(chain, plain):
    place = "s3://bucket/parts.parquet"
    words = [*chain.commands["condense"], "--partition-rows", "64"]
    words[words.index("--out") + 1] = place
    codes = []
    for point in (3, 14, 18):
        codes.append(chain.run(words, KCDCACHE_CRASHPOINT=str(point)))
        forgotten(chain.cache)
        assert "parts.parquet/_parts.json" not in chain.server.listed()
    assert codes == [-9] * 3, chain.log.read_text()
    assert chain.run(words) == 0, chain.log.read_text()
    names = [f"part-{number:05}-of-00004.parquet" for number in range(4)]
    found = [key.rpartition("/")[2] for key in chain.server.listed("parts.parquet") if ".owner" not in key]
    assert found == ["_parts.json", *names]
    forgotten(chain.cache)
    chain.log.write_text("")
    assert [chain.run(["inspect", where, "--json"]) for where in (place, "s3://bucket/made.parquet")] == [0, 0]
    one, other = (json.loads(line) for line in chain.log.read_text().splitlines() if line.startswith("{"))
    assert one["digest"] == other["digest"]
    assert chain.run(words) == 0  # the same again is accepted
    chain.server.delete("parts.parquet/_parts.json")
    assert chain.run(["inspect", place]) != 0
    assert chain.run(words) == 0
    assert not [key for key in chain.server.listed() if ".tmp-" in key]


def survives(place, plain, name, points):
    """Kill a step at points of its writing, twice here and then elsewhere; then it ends alike."""
    runs = (place.run, place.run, place.elsewhere)
    died = sum(run(name, KCDCACHE_CRASHPOINT=str(point)) == -9 for run, point in zip(runs, points, strict=True))
    assert place.taking(name) == 0, place.log.read_text()
    assert same(place, plain, name)
    return died


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_while_writing_and_run_again_here_or_elsewhere_it_ends_in_the_same_bytes(place, plain, seed):
    draw = random.Random(seed)
    for name in RESULTS:
        last, least = (5, 1) if name == "condense" else (25, 3)  # its one file may be there after the first kill
        assert survives(place, plain, name, [draw.randint(2, last) for _ in range(3)]) >= least


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_killed_at_any_step_of_writing_it_ends_in_the_same_bytes_elsewhere(place, plain, name):
    """From the beginning, killed at one step, gone on with on another machine: for steps from the first to the last."""
    for other in RESULTS:
        if other == name:
            break
        assert place.run(other) == 0
    place.proxy.faults = lambda method, path, number: ("503", "lost")[number % 2] if number % 11 == 0 else None
    draw = random.Random(0)
    point, hits = 1, 0
    while place.run(name, KCDCACHE_CRASHPOINT=str(point)) == -9:
        hits += 1
        assert place.elsewhere(name) == 0, place.log.read_text()
        assert same(place, plain, name)
        for key in [RESULTS[name]] if name == "condense" else place.server.listed(RESULTS[name]):
            place.server.delete(key)
        point += 1 if name == "condense" else draw.randint(1, 8)
    assert hits >= (5 if name == "condense" else 10)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True])
def test_two_shards_on_two_machines_make_the_store_of_one(place, plain, tmp_path, kill):
    """Each with a cache of its own, at once; one is killed and run again elsewhere."""
    words = place.commands["precompute"]

    def shard(number, cache, **more):
        given = access(place.proxy.port, tmp_path / cache) | more
        return Cold([*words, "--shard", f"{number}/2"], tmp_path / f"log{number}", **given)

    with ExitStack() as stack:
        running = [shard(0, "a"), shard(1, "b", **({"KCDCACHE_CRASHPOINT": "20"} if kill else {}))]
        for process in running:
            stack.callback(process.kill)
        assert all(process.ended(300) for process in running)
        assert [process.code for process in running] == [0, -9 if kill else 0]
        if kill:
            third = shard(1, "c")
            assert third.ended(300)
            assert third.code == 6
            owner = re.search(TAKE_OVER, (tmp_path / "log1").read_text())[2]
            third = shard(1, "c", KCDCACHE_OWNER=owner)
            assert third.ended(300)
            assert third.code == 0, (tmp_path / "log1").read_text()
    assert same(place, plain, "precompute")


@pytest.mark.slow
def test_a_recipe_several_at_once_ends_in_a_bucket(place, tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        """
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
    )
    for jobs in ("2", "1"):
        code = place.run(["run", str(recipe), "--out", "s3://bucket/grid", "--jobs", jobs, "--threads", "1"])
        assert code == 0, place.log.read_text()
    there = {key for key in place.server.listed("grid") if ".owner" not in key}
    assert {"grid/results.json", "grid/report.html", "grid/kd-seed1/summary.json"} <= there
    assert not [key for key in there if b"/cache/s3" in place.server.read(key)]
    results = json.loads(place.server.read("grid/results.json"))
    assert [run["step"] for run in results["runs"]] == ["teacher", "store", "kd", "kd"]
