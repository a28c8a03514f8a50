"""`python -m tests` runs all that CI runs: format, lint, types, tests. Arguments go to pytest."""

import subprocess
import sys

CHECKS = (
    ("format", ["ruff", "format", "--check", "kcdcache", "tests", "pipelines"]),
    ("lint", ["ruff", "check", "kcdcache", "tests", "pipelines"]),
    ("types", ["mypy"]),
    ("tests", ["pytest", *sys.argv[1:]]),
)

for name, command in CHECKS:
    print(f"== {name}: {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if code:
        sys.exit(code)
