"""Commands on hostile files in a process of their own whose memory and time are limited by the system."""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from killing import ROOT, environment

MEMORY = 300 * 2**20
"""bytes a command may take beyond what it has after importing everything"""
SECONDS = 20
"""of processor time"""


@contextmanager
def confinement():
    """Yield a function that runs words of a command line, or Python text, and returns its exit code and output.

    Each runs in a fork of a process that has imported everything and computed nothing. Standard input is empty, the
    working directory is `folder`, and the output is what both streams together hold.
    """
    places = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    held = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # mimalloc and malloc reserve address space per thread that they never use, which the limit would count
        env=environment(PYTHONPATH=places, ARROW_DEFAULT_MEMORY_POOL="system", MALLOC_ARENA_MAX="1"),
    )

    def run(*words, text=None, folder=".", memory=MEMORY):
        request = {"words": list(map(str, words)), "text": text, "folder": str(folder), "memory": memory}
        held.stdin.write(json.dumps(request).encode() + b"\n")
        held.stdin.flush()
        return SimpleNamespace(**json.loads(held.stdout.readline()))

    try:
        yield run
    finally:
        held.stdin.close()
        held.wait()
        held.stdout.close()


def _serve():
    import sklearn.datasets  # noqa: F401 -- slow to import, and loaded by every command

    from kcdcache.report import show  # noqa: F401

    for line in sys.stdin.buffer:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            _obey(json.loads(line), theirs)
        os.close(theirs)
        with open(ours, "rb") as stream:
            output = stream.read().decode(errors="replace")
        status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"code": code, "output": output, "timed_out": code == -signal.SIGXCPU}), flush=True)


def _obey(request, pipe):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    os.chdir(request["folder"])
    sys.argv[1:] = request["words"]
    _limit(request["memory"])
    code = 1
    try:
        _work(request)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through the way out of the process that forked this one


def _work(request):
    from kcdcache.cli import main

    if request["text"] is None:
        main.main(request["words"])
    exec(compile(request["text"], "<test>", "exec"), {"__name__": "test"})
    raise SystemExit(0)


def _limit(memory):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    signal.alarm(3 * SECONDS)  # a process that waits for ever uses no processor time


if __name__ == "__main__":
    _serve()
