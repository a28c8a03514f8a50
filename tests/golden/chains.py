"""What the golden comparison makes from a checkout: short chains of `python -m kcdcache ...` with fixed seeds.

Only the command line is used, so that the chains do not depend on what modules are called. Each chain writes into a
folder of its own name below one work folder, which is also the current one, so that all paths in records are the same.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

STORED = "&order=stored"
"""option that older checkouts do not know: there a limit always meant it"""
DIGITS = f"--data digits?train=200&test=100{STORED}"
RUN = "--threads 1 --batch-size 25 --learning-rate 0.01"
STORE = "--threads 1 --batch-size 50 --min-accuracy 0 --teacher digits/teacher"
SHARD = f"precompute {DIGITS} {STORE} --store shards/store --views 4 --shard"
GROWN = f"precompute {DIGITS} {STORE} --store grown/store --encoding top:3"
TRAIN = f"train {DIGITS} {RUN} --store digits/store --student resnet8"
LINEAR = f"{TRAIN} --out digits/linear --epochs 3 --stages 3"
VALUES = "condense --values digits/linear/values.parquet --store digits/store --keep 0.5"
LAST = "--previous digits/linear/stages/2/manifest.parquet"


class Chain(NamedTuple):
    """Commands in order, and the chains whose results they read."""

    needs: tuple[str, ...]
    commands: str
    """one a line: its name (what it answers is kept as CHAIN/told/NAME.json), then what stands behind `kcdcache`

    `A & B` are two commands at the same time, whose answers are not kept; `torchrun 2 A` is one in two processes.
    """
    recipe: str = ""
    """TOML that is written as CHAIN.toml before the first command"""


METHODS = """
title = "a reused set, methods, samplings, readings"
data = "digits?train=200&test=100&order=stored"
seeds = [1]
[[step]]
name = "plain"
run = "fit"
model = "resnet8"
epochs = 2
batch_size = 50
learning_rate = 0.01
label_smoothing = 0.1
clock = "samples"
[[step]]
name = "store"
run = "precompute"
teacher = "digits/teacher"
views = 2
batch_size = 40
min_accuracy = 0
fields = ["logits", "penultimate", "attention", "maps:stage2", "parameters"]
encoding = "float32"
compression = "zstd"
[[step]]
name = "reuse"
run = "train"
store = "digits/store"
manifest = "digits/half.parquet"
student = "wrn_10_2"
epochs = 1
stages = 1
batch_size = 25
learning_rate = 0.01
[[step]]
name = "m"
run = "train"
per_seed = true
store = "@store"
student = "resnet8"
epochs = 2
stages = 2
keep = 0.6
batch_size = 50
learning_rate = 0.01
variant = [
  { name = "crd", method = "crd+at", crd_negatives = 64, nesterov = true },
  { name = "fitnet", method = "dkd+fitnet", crd_bank = "kept", warmup_epochs = 1 },
  { name = "dml", method = "dml", record = "ema", observed = "loss" },
  { name = "kr", method = "kd+kr*10", decay = "cosine", schedule = "alg1_shift" },
  { name = "release", preset = "release", teacher = "digits/teacher", mix = "additive_clip", mix_label = "mix" },
  { name = "logit", method = "eakd", mix_target = "linear_logit", stratify = true, eps_grid = "inclusive" },
  { name = "random", ranking = "random", k0 = "stage_slice", candidates = "current", schedule = "poster" },
  { name = "infobatch", sampling = "infobatch", cached_views = 1 },
  { name = "unix", sampling = "unix", augment_kept = false, alpha = 1.0, gamma = 0.0 },
  { name = "rs2", sampling = "random_per_epoch", augment_kept = false, clock = "samples" },
]
"""
FOLDERS = """
title = "class folders of PNG and JPEG files of differing sizes"
data = "folder:images?noise=0.2"
[[step]]
name = "teacher"
run = "fit"
model = "resnet14"
epochs = 2
batch_size = 16
learning_rate = 0.01
augment = "resized-crop-flip"
size = 24
views = 2
[[step]]
name = "store"
run = "precompute"
teacher = "@teacher"
augment = "resized-crop-flip"
size = 24
views = 2
encoding = "top:2"
compression = "zstd"
min_accuracy = 0
[[step]]
name = "kcd"
run = "train"
store = "@store"
student = "resnet8"
epochs = 2
batch_size = 16
learning_rate = 0.01
stages = 2
keep = 0.7
preset = "paper"
[[step]]
name = "half"
run = "condense"
store = "@store"
values = "@kcd:values"
previous = "@kcd:condensed"
keep = 0.5
"""

CHAINS = {
    "digits": Chain(
        (),
        f"""
        fit         fit {DIGITS} {RUN} --model resnet14 --out digits/teacher --epochs 3
        precompute  precompute {DIGITS} {STORE} --store digits/store --views 3 --fields logits,penultimate
        until       {LINEAR} --until 2
        linear      {LINEAR}
        requery     {TRAIN} --out digits/requery --epochs 3 --stages 3 --seed 1 \
                    --mix-target requery --teacher digits/teacher
        condense    {VALUES} {LAST} --out digits/half.parquet
        store       inspect digits/store
        run         inspect digits/linear
        set         inspect digits/half.parquet
        values      inspect digits/linear/values.parquet
        diff        diff digits/linear digits/requery
        """,
    ),
    "condense": Chain(
        ("digits",),
        f"""
        parts     {VALUES} {LAST} --out condense/parts --partition-rows 40
        beside    {VALUES} {LAST} --out condense/beside.parquet --memory-gb 0.000001
        random    {VALUES} --out condense/random.parquet --ranking random --condense-seed 3 --stage 1
        stratify  {VALUES} {LAST} --out condense/stratify.parquet --stratify --eps-grid one_based
        slice     {VALUES} {LAST} --out condense/slice.parquet --k0 stage_slice --candidates current
        direct    {VALUES} --out condense/direct.parquet --no-augment-kept --cost-exponent 0
        release   {VALUES} {LAST} --out condense/release.parquet --preset release --unseen last
        inspect   inspect condense/parts
        """,
    ),
    "methods": Chain(("digits",), "run run methods.toml --threads 1 --out methods/run", METHODS),
    "folders": Chain((), "run run folders.toml --threads 1 --out folders/run", FOLDERS),
    "export": Chain(
        ("digits",),
        f"""
        images      export --manifest digits/linear --store digits/store --out export/set {DIGITS} \
                    --with-images --views 2 --license cc-by-4.0
        bake        export --manifest digits/half.parquet --store digits/store --out export/baked \
                    --bake --temperature 4 --compression zstd
        from-set    train --condensed export/set --data condensed:export/set {RUN} --student resnet8 \
                    --out export/run --epochs 2 --method kd+pkt
        from-baked  train --condensed export/baked {DIGITS} {RUN} --student resnet8 --out export/run-baked --epochs 1
        inspect     inspect export/set
        """,
    ),
    "requery": Chain(
        ("digits",),
        f"""
        set    {VALUES} {LAST} --out requery/set.parquet --k0 stage_slice --candidates current
        fill   precompute {DIGITS} --threads 1 --teacher digits/teacher --store digits/store \
               --manifest requery/set.parquet --mix additive_clip
        train  {TRAIN} --out requery/run --epochs 1 --stages 1 --manifest requery/set.parquet \
               --mix-target requery --mix additive_clip
        """,
    ),
    "grown": Chain(
        ("digits",),
        f"""
        first    {GROWN} --views 1
        views    {GROWN} --views 3
        fields   {GROWN} --views 3 --fields logits,penultimate,rotations,boundary,fsp
        inspect  inspect grown/store
        """,
    ),
    "shards": Chain(("digits",), f"fill {SHARD} 0/2 & {SHARD} 1/2\nseal seal shards/store"),
    "torchrun": Chain(("digits",), f"train torchrun 2 {TRAIN} --out torchrun/run --epochs 2 --stages 2 --keep 0.6"),
    "report": Chain(
        ("digits",),
        f"report report digits/linear digits/requery --out report/page.html --json-file report/numbers.json {DIGITS}",
    ),
}


def wanted(only: str | None) -> list[str]:
    """Return the names of the chains to make, in order: all, or one with what it needs."""
    if only is None:
        return list(CHAINS)
    found = {only}
    for name in reversed(CHAINS):
        found |= set(CHAINS[name].needs) if name in found else set()
    return [name for name in CHAINS if name in found]


def make(name: str, checkout: Path, work: Path) -> str:
    """Make one chain of a checkout in `work`; return "" or what went wrong: the chain ends there.

    A failure is also left as told/COMMAND.failed, which the comparison finds.
    """
    chain, told = CHAINS[name], work / name / "told"
    told.mkdir(parents=True)
    if chain.recipe:
        (work / f"{name}.toml").write_text(_as_known(chain.recipe, checkout))
    if name == "folders":
        make_images(work / "images")
    commands = _as_known(chain.commands, checkout)
    for name, line in (command.split(maxsplit=1) for command in commands.strip().splitlines()):
        running = [_start(words.split(), checkout, work) for words in line.split(" & ")]
        answers = [process.communicate() for process in running]
        for process, (_, errors) in zip(running, answers, strict=True):
            if process.returncode:
                trouble = f"{line}: exit code {process.returncode}\n{errors[-3000:]}"
                (told / f"{name}.failed").write_text(trouble)
                return trouble
        if len(running) == 1:  # of several, the last to end seals the store and tells more
            (told / f"{name}.json").write_text(answers[0][0])
    return ""


def _as_known(text: str, checkout: Path) -> str:
    spec = checkout / "kcdcache/datasets/spec.py"
    return text if spec.exists() and "order:" in spec.read_text() else text.replace(STORED, "")


def surroundings(checkout: Path, work: Path) -> dict[str, str]:
    """Return the environment of a command: the checkout's package, one thread, no GPU, nothing of the user's."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH") if key in os.environ}
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    cache = {"KCDCACHE_CACHE": str(work / "cache"), "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
    return kept | one | cache | {"PYTHONPATH": str(checkout)}


def state(checkout: Path) -> str:
    """Return what decides the bytes that a clean checkout makes here: its commit, these chains, the machine.

    Raises:
        RuntimeError: another package would be imported than the checkout's.
    """
    where = "import kcdcache, torch, numpy; print(kcdcache.__file__, torch.__version__, numpy.__version__)"
    found = _answer(sys.executable, "-c", where, cwd="/", env=surroundings(checkout, checkout)).split()
    if Path(found[0]).parent != checkout / "kcdcache":
        raise RuntimeError(f"python imports {found[0]}, expected the package of {checkout}")
    commit = _answer("git", "rev-parse", "HEAD", cwd=checkout).strip()
    changed = _answer("git", "status", "--porcelain", "kcdcache", cwd=checkout)
    cpus = Path("/proc/cpuinfo")
    cpu = re.search("model name.*", cpus.read_text() if cpus.exists() else "")
    machine = [cpu[0] if cpu else platform.processor(), platform.node()]
    return "\n".join([commit, changed, *found[1:], *machine, Path(__file__).read_text()])


def _answer(*words: str, **how: Any) -> str:
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE, **how).stdout


def make_images(folder: Path) -> None:
    """Write train and test folders of three classes: smooth coloured noise of differing sizes, as PNG and JPEG."""
    draw = np.random.default_rng(20)
    for split, count in (("train", 14), ("test", 5)):
        for label in range(3):
            place = folder / split / f"class {label}"
            place.mkdir(parents=True)
            for number in range(count):
                width, height = (int(side) for side in draw.integers(24, 48, 2))
                small = draw.integers(0, 180, (5, 5, 3), dtype=np.uint8)
                small[..., label] += 70
                image = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
                image.save(place / f"{number:02d}.{'png' if number % 2 else 'jpg'}")


def _start(words: list[str], checkout: Path, work: Path) -> "subprocess.Popen[str]":
    launcher = []
    if words[0] == "torchrun":
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", words[1], "-m"]
        words = words[2:]
    line = [sys.executable, "-m", *launcher, "kcdcache", *words, "--json", "--quiet"]
    environment = surroundings(checkout, work)
    return subprocess.Popen(line, cwd=work, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
