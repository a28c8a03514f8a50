"""Commands as the processes of one run: forked from one that imported all, or started by torchrun."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from killing import POLL, ROOT, environment
from torch import nn

PLAIN = "ranks:PlainNet"
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


class PlainNet(nn.Module):
    """A network without batch statistics or dropout, in float64: what differs between worlds is only rounding."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4 * 49, num_classes)
        self.double()

    def forward(self, pixels):
        return self.fc(torch.relu(self.conv(pixels.double())).flatten(1))


class Forked:
    """A command by so many processes, forks of a nursery's, which nobody ends if one of them dies."""

    def __init__(self, start, words, world, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._notes, self._logs = Path(f"{log}.notes"), [Path(f"{log}.{rank}") for rank in range(world)]
        asked = [list(map(str, words)), list(map(str, self._logs)), port, str(self._notes)]
        self._process = start(f"import ranks; ranks.fork(*{asked!r})", log)

    def signal_once(self, reached, rank, number):
        """Send a signal to one of them once a run has got so far."""
        while not reached():
            assert not self._process.ended(POLL), self.told()
        os.kill(int(self._notes.read_text().split()[rank]), number)

    def codes(self):
        """Wait for all; return how each ended."""
        assert self._process.ended(120), self.told()
        return list(map(int, self._notes.read_text().split("ended")[1].split()))

    def told(self):
        return [one.read_text() if one.exists() else "" for one in self._logs]


def fork(words, logs, port, notes):
    """Become the parent of the processes that torchrun would start; write down their numbers and how each ended."""

    from kcdcache.cli.main import main

    children = [_child(words, logs, rank, port, main) for rank in range(len(logs))]
    with open(notes, "w") as stream:
        print(*children, file=stream, flush=True)
        ended = dict(os.wait() for _ in children)
        print("ended", *(os.waitstatus_to_exitcode(ended[one]) for one in children), file=stream)


def _child(words, logs, rank, port, main):
    if pid := os.fork():
        return pid
    stream = os.open(logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(logs), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.argv[1:] = words
    code = 1
    try:
        main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def launched(world, words, log):
    """A command under torchrun, one process per rank."""
    # the launcher picks a free port, so that tests do not meet
    meeting = ["--nproc-per-node", str(world), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    launch = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "kcdcache", *map(str, words)]
    with open(log, "ab") as stream:
        return subprocess.Popen(launch, stdout=stream, stderr=stream, env=environment(PYTHONPATH=PATH))


def ran(world, words, log):
    """Run a command under torchrun to its good end."""
    code = launched(world, words, log).wait(300)
    assert code == 0, Path(log).read_text()


def stopped(process, log, reached, number, seconds=60):
    """Send a signal once a run has got so far: SIGKILL to its last process, others to the launcher; it ends in time."""
    while not reached():
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL)
            raise AssertionError(Path(log).read_text())
    if number == signal.SIGKILL:  # one of them dies: torchrun ends the others
        os.kill(max(children(process.pid)), number)
    else:
        process.send_signal(number)
    assert process.wait(seconds) != 0


def children(parent):
    found = []
    for path in Path("/proc").iterdir():
        try:
            stat = (path / "stat").read_text() if path.name.isdecimal() else ""
        except OSError:
            continue
        if stat and int(stat.rpartition(")")[2].split()[1]) == parent:
            found.append(int(path.name))
    return found
