"""Commands as the processes of one run: forked from one that imported all, or started by torchrun."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from killing import POLL, environment
from torch import nn

PLAIN = "ranks:PlainNet"


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
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(world)}
        self._logs = [Path(f"{log}.{rank}") for rank in range(world)]
        self._processes = [
            start(words, log, RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank, log in enumerate(self._logs)
        ]

    def signal_once(self, reached, rank, number):
        """Send a signal to one of them once a run has got so far."""
        while not reached():
            assert not self._processes[rank].ended(POLL), self.told()
        self._processes[rank].signal(number)

    def ended(self, rank, seconds):
        """Wait at most so long for one of them; return whether it has ended."""
        return self._processes[rank].ended(seconds)

    def codes(self):
        """Wait for all; return how each ended."""
        assert all(process.ended(120) for process in self._processes), self.told()
        return [process.code for process in self._processes]

    def told(self):
        return [one.read_text() for one in self._logs]


def launched(world, words, log):
    """A command under torchrun, one process per rank."""
    # the launcher picks a free port, so that tests do not meet
    meeting = ["--nproc-per-node", str(world), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    launch = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "kcdcache", *map(str, words)]
    with open(log, "ab") as stream:
        return subprocess.Popen(launch, stdout=stream, stderr=stream, env=environment())


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
