"""`python -m tests` runs all that CI runs: format, lint, spelling, types, site, tests. Arguments go to pytest."""

import os
import subprocess
import sys

CHECKS = (
    ("format", ["ruff", "format", "--check", "kcdcache", "tests", "pipelines", "notebooks", "docs"]),
    ("lint", ["ruff", "check", "kcdcache", "tests", "pipelines", "notebooks", "docs"]),
    ("spelling", ["codespell_lib", "kcdcache", "tests", "pipelines", "docs", "README.md", "CHANGELOG.md"]),
    ("types", ["mypy"]),
    ("site", ["mkdocs", "build", "--quiet", "--strict", "--config-file", "docs/mkdocs.yml"]),
    ("tests", ["pytest", "-n", "2", "--dist", "loadfile", *sys.argv[1:]]),
)
# two processes share two cores: with two threads each they would wait for each other most of the time
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NO_MKDOCS_2_WARNING": "1", **os.environ}

for name, command in CHECKS:
    print(f"== {name}: {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *command], env=ENVIRONMENT, check=False).returncode
    if code:
        sys.exit(code)
