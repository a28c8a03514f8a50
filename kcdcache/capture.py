"""A step of fixed shapes at fixed addresses, recorded once and replayed: on a GPU as one CUDA graph."""

from collections.abc import Callable, Hashable

import torch

WARM_UP = 3
"""runs before the first recording: libraries and optimizers allocate what lasts during their first ones"""


class Replay:
    """Work that is recorded and replayed while its key stays the same: numbers that a recording holds as constants.

    The work must not wait for the device, and must read and write the same memory each time. On a CPU nothing is
    recorded: the work is called.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._runs = 0
        self._key: Hashable = None
        self._recorded: Callable[[], None] | None = None

    def __call__(self, key: Hashable) -> None:
        """Do the work once."""
        if self._runs < WARM_UP:
            self._runs += 1
            self._run_aside()
            return
        if self._recorded is None or key != self._key:
            self._recorded = None  # frees its memory before the next one takes as much
            self._key, self._recorded = key, self._record()
        self._recorded()

    def _run_aside(self) -> None:
        """Work on the stream that will record, as CUDA asks for, in order with the work before and after."""
        if self._stream is None:
            self._work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._work()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _record(self) -> Callable[[], None]:
        if self._stream is None:
            return self._work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._work()
        replay: Callable[[], None] = graph.replay
        return replay
