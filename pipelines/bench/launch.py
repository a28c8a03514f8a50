"""Time and peak memory of a command, told by the system when it ends."""

import subprocess
import sys

LAUNCHER = """
import os, subprocess, sys, time
began = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
output = child.stdout.read()
_, status, usage = os.wait4(child.pid, 0)
seconds = time.perf_counter() - began
sys.stdout.buffer.write(f"{os.waitstatus_to_exitcode(status)} {seconds} {usage.ru_maxrss}\\n".encode() + output)
"""


def measured(words):
    """Run a command; return (seconds, peak MiB, output).

    A small process starts it: a process begins with the memory of the one that starts it, as far as its peak is told.
    """
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *map(str, words)], capture_output=True, text=True)
    told, _, output = done.stdout.partition("\n")
    code, seconds, peak = told.split()
    if int(code):
        raise SystemExit(f"{' '.join(map(str, words))} failed with {code}: {done.stderr}")
    return float(seconds), int(peak) / 1024, output
