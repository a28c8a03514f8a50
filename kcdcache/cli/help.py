"""What `kcdcache --help` shows: every command's line and examples; imports nothing, so that it is shown at once."""

SUMMARIES = {
    "run": "Do a whole chain of steps from a recipe; without one, the embedded example.",
    "fit": "Train a teacher or a plain baseline on hard labels.",
    "precompute": "Run the teacher once and keep its outputs in a store.",
    "train": "Train a student from a store, condensing between stages (Algorithm 1).",
    "methods": "List the distillation methods: what each reads of the teacher, bytes per sample, source.",
    "condense": "Turn values into the next condensed set (a manifest).",
    "export": "Write a condensed set and the knowledge it needs as one folder, for another machine or the hub.",
    "diff": "Compare two condensed sets, runs stage by stage, or exported sets.",
    "report": "Write one HTML file that shows what finished runs did: tables, figures, images, provenance.",
    "seal": "Seal a store whose parts are all written, should the process that would have done so have ended.",
    "inspect": "Tell what a store, manifest, values file, run, exported set or network holds.",
    "verify": "Check whether what lies there is what was written; with a teacher, compute points again.",
}
"""command -> its line in `kcdcache --help`, which must not import what the commands need"""
ARGUMENTS = {
    "run": "RECIPE is a TOML file of [[step]] tables, each a command with its settings; README shows how they are "
    "written and pipelines/ holds those of the paper's tables. Left out, a small chain on embedded digits is done.",
    "report": "Each path is a run's folder, or a folder of runs such as a recipe's --out.",
    "diff": "A and B are manifests, runs, or exported sets.",
    "seal": "PATH is a store's folder.",
    "inspect": "PATH is a store, manifest, values file, run, exported set or network.",
    "verify": "PATH is a store, manifest, values file, run, exported set or network. Of a store, records, listing and "
    "sizes are compared unless --read-data or --sample reads the chunks too.",
}
"""what the arguments of a command stand for"""
EXAMPLES = {
    "run": ("kcdcache run", "kcdcache run pipelines/cifar100_small.toml --data cifar100"),
    "fit": ("kcdcache fit --data cifar100 --model wrn_40_2 --out runs/teacher",),
    "precompute": (
        "kcdcache precompute --data cifar100 --teacher runs/teacher --store runs/store --views 40",
        "kcdcache precompute --data cifar100 --teacher runs/teacher --store runs/store --fields penultimate",
    ),
    "train": (
        "kcdcache train --store runs/store --data cifar100 --student wrn_16_2 --out runs/kcd",
        "kcdcache train --store runs/store --data cifar100 --student resnet8x4 --out runs/reuse \\\n"
        "      --manifest runs/kcd/stages/6/manifest.parquet --stages 1",
    ),
    "condense": (
        "kcdcache condense --values runs/kcd/values.parquet --store runs/store --keep 0.5 --out half.parquet",
    ),
    "methods": ("kcdcache methods", "kcdcache methods --teacher resnet32x4 --student ShuffleV2 --encoding top:16"),
    "export": (
        "kcdcache export --manifest runs/kcd --store runs/store --out runs/set --license cc-by-4.0",
        "kcdcache export --manifest half.parquet --store runs/store --out runs/set --data cifar100 --with-images",
        "kcdcache train --condensed runs/set --data cifar100 --student resnet8x4 --out runs/student",
    ),
    "diff": ("kcdcache diff runs/kcd runs/other", "kcdcache diff half.parquet runs/kcd/stages/6/manifest.parquet"),
    "report": (
        "kcdcache report runs/digits --out digits.html",
        "kcdcache report runs/kd runs/kcd --out both.html --data cifar100 --json-file both.json --csv both",
    ),
    "seal": ("kcdcache seal runs/store",),
    "inspect": ("kcdcache inspect runs/store",),
    "verify": (
        "kcdcache verify runs/store --read-data",
        "kcdcache verify runs/store --teacher runs/teacher --data cifar100",
        "kcdcache verify runs/store --repair --teacher runs/teacher --data cifar100",
    ),
}
