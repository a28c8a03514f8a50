"""Commands as processes of their own that are killed: real ones, and ones forked from a process that imported all."""

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
POLL = 0.002
"""seconds between looks at a folder"""
LITTLE = {"memory": 300 * 2**20, "seconds": 20}
"""what a command on hostile files may take: bytes beyond those after importing everything, and processor time"""


def environment(**more):
    """One thread, and nothing of ours."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("KCDCACHE")}
    return plain | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | more


class Cold:
    """A command as users start it: `python -m kcdcache ...`."""

    def __init__(self, words, log, **variables):
        """Start a command's words, or Python text in their place."""
        line = ["-c", words] if isinstance(words, str) else ["-m", "kcdcache", *map(str, words)]
        with open(log, "ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, *line], stdout=stream, stderr=stream, env=environment(**variables)
            )

    def ended(self, seconds):
        """Wait at most so long; return whether the process has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def signal(self, number):
        self._process.send_signal(number)

    def kill(self):
        self._process.kill()
        self._process.wait()

    @property
    def code(self):
        return self._process.returncode


class Warm:
    """The same command in a fork of a nursery: it starts in milliseconds instead of seconds."""

    def __init__(self, asked, words, log, limits=None, **variables):
        told = words if isinstance(words, str) else list(map(str, words))
        request = {"words": told, "log": str(log), "variables": variables, "limits": limits or {}}
        self._answers, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(asked, [json.dumps(request).encode()], [theirs.fileno()])
        self._lines = self._answers.makefile("rb", buffering=0)
        self.code = None
        self._pid = int(self._lines.readline())

    def ended(self, seconds):
        if self.code is None and select.select([self._lines], [], [], seconds)[0]:
            self.code = int(self._lines.readline())
            self._lines.close()
            self._answers.close()
        return self.code is not None

    def signal(self, number):
        if self.code is None:  # until its code is read, the number is this process's, dead or alive
            os.kill(self._pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.ended(60)


@contextmanager
def nursery():
    """Yield a function that starts a command, many at once if asked: (words, log, limits, **environment variables) ->
    its process, a fork of one that has imported everything and computed nothing.

    In place of a command's words it takes Python text, which runs with the tests' modules at hand.
    `limits` may hold `user` (a user number to become), `memory` (bytes it may take beyond what it has when it starts),
    `file` (bytes of its largest file), `seconds` (of processor time) and `folder` (to work in).
    """
    # an arena per thread reserves address space that is never used, which a limit on it would count
    plain = environment(MALLOC_ARENA_MAX="1", ARROW_DEFAULT_MEMORY_POOL="system")
    asked, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with subprocess.Popen([sys.executable, __file__], stdin=theirs.fileno(), env=plain), asked:
        theirs.close()
        yield partial(Warm, asked)


def finished(start, words, log, **how):
    """Run a command to its end; return its exit code."""
    process = start(words, log, **how)
    assert process.ended(300), f"still running: {words}"
    return process.code


def confined(start, log):
    """A function that runs words or Python text in little memory and time, and returns its exit code and output."""

    def run(*words, text=None, folder="."):
        log.unlink(missing_ok=True)
        code = finished(start, text or words, log, limits=LITTLE | {"folder": str(folder)})
        return SimpleNamespace(code=code, output=log.read_text(errors="replace"))

    return run


def succeeds(start, words, log):
    code = finished(start, words, log)
    assert code == 0, Path(log).read_text()


def traces(folder, pattern):
    """What work leaves behind: equal until a file that matches is written or replaced."""
    found = {}
    for path in folder.rglob(pattern):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # replaced between the listing and the look
        found[path] = status.st_ino, status.st_mtime_ns, status.st_size
    return found


def killed(start, words, log, folder, pattern, seconds):
    """Run a command, wait until it writes what matches, kill it `seconds` later; return whether that hit it alive."""
    before = traces(folder, pattern)
    process = start(words, log)
    while not process.ended(POLL) and traces(folder, pattern) == before:
        pass
    if process.ended(seconds):
        assert process.code == 0, Path(log).read_text()
        return False
    process.kill()
    return process.code == -signal.SIGKILL


def survived(start, words, log, folder, random, kills, longest, patterns=("*",)):
    """Kill a command up to `kills` times at moments drawn by `random`, then let it finish; return how often it died.

    The first time it dies as soon as it has written something, so that a fast machine cannot outrun every kill.
    """
    hits = 0
    for number in range(kills):
        pattern, seconds = random.choice(patterns), random.uniform(0, longest) if number else 0.0
        if not killed(start, words, log, folder, pattern, seconds):
            break
        hits += 1
    succeeds(start, words, log)
    return hits


def _serve():
    """Fork a minder for every request that comes by the socket in the place of stdin, until nobody can ask any more."""
    import lessons  # noqa: F401
    import sklearn.datasets  # noqa: F401 -- slow to import, and loaded by every command
    import torch._dynamo  # noqa: F401 -- loaded by a first step, which another user than root could not do here

    from kcdcache.cli import main
    from kcdcache.commands import verify  # noqa: F401
    from kcdcache.report import show  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for minders
    asked = socket.socket(fileno=0)
    while True:
        request, answers, *_ = socket.recv_fds(asked, 2**16, 1)
        if not request:
            os._exit(0)  # taking down all that was imported takes seconds
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _mind(json.loads(request), socket.socket(fileno=answers[0]), main.main)
        os.close(answers[0])


def _mind(request, answers, main):
    """Fork a process that obeys; answer with its number, and with its exit code when it ends."""
    child = os.fork()
    if child == 0:
        answers.close()
        _obey(request, main)
    answers.sendall(b"%d\n" % child)
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    answers.sendall(b"%d\n" % (ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status))
    answers.recv(1)  # until the other end is closed, the number is not given to another process
    os.waitpid(child, 0)
    os._exit(0)


def _obey(request, main):
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["variables"])
    words = request["words"]
    sys.argv[1:] = [] if isinstance(words, str) else words
    _confine(**request["limits"])
    code = 1
    try:
        if isinstance(words, str):
            exec(words, {})
            code = 0
        else:
            main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through the nursery's own way out


def _confine(user=None, memory=None, file=None, seconds=None, folder="."):
    os.chdir(folder)
    if memory is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    if file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
    if seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        signal.alarm(3 * seconds)  # a process that waits for ever uses no processor time
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)


if __name__ == "__main__":
    _serve()
