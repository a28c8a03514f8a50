"""`--config FILE.toml`, a run's settings as such a file, and what a shell offers while a command is typed."""

import json
import subprocess
import sys

import pytest
from commands import HEAVY, failure, outcome
from killing import environment
from pupils import SPEC, lines, same_files, school

from kcdcache.methods.catalogue import METHODS
from kcdcache.networks.catalogue import NETWORKS

RUN = """
student = "lessons:TinyNet"
epochs = 2
stages = 2
batch-size = 64
keep = 0.6
milestones = [0.5]
nesterov = true
seed = 3
threads = 1
log = ["csv"]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("settings"))


@pytest.fixture
def written(tmp_path):
    """Write a settings file; return its path."""

    def write(text):
        (tmp_path / "given.toml").write_text(text)
        return tmp_path / "given.toml"

    return write


def words(place, out, *more):
    return ["train", *lines({"data": SPEC, "store": place.knowledge.path, "out": out}), *more]


def test_a_file_gives_settings_flags_win_and_a_runs_own_file_makes_the_same_run(capsys, place, tmp_path, written):
    code, _, told = outcome(capsys, *words(place, tmp_path / "one", "--config", written(RUN), "--seed", "4", "-q"))
    assert (code, told) == (0, "")
    held = json.loads((tmp_path / "one" / "run.json").read_text())["settings"]
    chosen = {name: held[name] for name in ("batch_size", "milestones", "nesterov", "seed", "keep")}
    assert chosen == {"batch_size": 64, "milestones": [0.5], "nesterov": True, "seed": 4, "keep": 0.6}
    _, printed, _ = outcome(capsys, "inspect", tmp_path / "one", "--toml")
    again = [*words(place, tmp_path / "two", "--config", written(printed), "--log", "csv"), "--threads", "1", "-q"]
    assert outcome(capsys, *again)[0] == 0
    assert json.loads((tmp_path / "two" / "run.json").read_text())["settings"] == held
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_required_settings_and_arguments_may_come_from_the_file(capsys, place, written):
    code, printed, _ = outcome(capsys, "inspect", "--config", written(f'path = "{place.knowledge.path}"'), "--json")
    assert (code, json.loads(printed)["kind"]) == (0, "store")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epocks = 3", "unknown setting 'epocks' in {path}; did you mean 'epochs'"),
        ("batch_sizes = 3", "unknown setting 'batch_sizes' in {path}; did you mean 'batch-size'"),
        ('decay = "linear"', "setting 'decay' in {path}: 'linear' is not one of 'milestones', 'cosine', 'constant'"),
        ("[train]\nepochs = 3", "unknown setting 'train' in {path}; "),
        ("[epochs]\nn = 3", "setting 'epochs' in {path} is a table"),
        ("epochs = -3", "setting 'epochs' in {path} or the command line: "),
        ("epochs = ", "{path} is not valid TOML"),
        (None, "no settings file at {path}"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_nearest_key(capsys, place, tmp_path, written, text, said):
    path = tmp_path / "none.toml" if text is None else written(text)
    code, told = failure(capsys, *words(place, tmp_path / "run", "--student", "resnet8", "--config", path))
    assert code in (2, 10)
    assert said.format(path=path) in told
    assert not (tmp_path / "run").exists()


def test_only_runs_have_settings_to_print(capsys, place):
    code, told = failure(capsys, "inspect", place.knowledge.path, "--toml")
    assert code != 0
    assert "is a store; --toml prints the settings of a run" in told


def offers(*typed):
    """The heavy modules loaded and the words offered for the last of the typed ones, as bash asks for them."""
    asked = {"_KCDCACHE_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(("kcdcache", *typed))}
    code = (
        "import sys\nfrom kcdcache.cli import main\n"
        "try:\n    main.main()\nfinally:\n"
        f"    print('loaded:', *[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=environment(**asked, COMP_CWORD=str(len(typed))),
    )  # fmt: skip
    assert done.stderr.strip() == "loaded:"
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["pre"], ["precompute"]),
        (["train", "--warm"], ["--warmup-epochs"]),
        (["train", "--optimizer", "a"], ["adamw"]),
        (["train", "--student", "resnet8"], [name for name in NETWORKS if name.startswith("resnet8")]),
        (["train", "--method", "kd+r"], [f"kd+{name}" for name in METHODS if name.startswith("r")]),
        (["fit", "--log", "csv,t"], ["csv,tensorboard"]),
        (["fit", "--data", "cifar100"], ["cifar100"]),
    ],
)
def test_a_shell_is_offered_names_without_loading_anything_heavy(typed, offered):
    assert offers(*typed) == offered


def test_the_line_that_switches_completion_on_is_clicks():
    done = subprocess.run(
        [sys.executable, "-m", "kcdcache"], capture_output=True, text=True, check=False,
        env=environment(_KCDCACHE_COMPLETE="bash_source"),
    )  # fmt: skip
    assert "complete -o nosort -F _kcdcache_completion kcdcache" in done.stdout
