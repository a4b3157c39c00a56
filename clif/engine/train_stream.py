"""Launches one training slice at a time on a stream of its own, while serving steps run on theirs.

No thread of Python: a launch returns before the work is done, and an event says when it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ClassVar

from clif.engine.stopwatch import Stopwatch, Timing
from clif.engine.streams import Streams


class TrainStream:
    """Also while nothing is served: then the device has nothing else to do."""

    always: ClassVar[bool] = True

    def __init__(self, streams: Streams, stopwatch: Stopwatch) -> None:
        self._streams, self._stopwatch = streams, stopwatch
        self._launched: tuple[Future[Any], Timing] | None = None

    def close(self) -> None:
        """Wait for the slice that runs."""
        if self._launched is not None:
            self._launched[1].wait()

    def start(self, work: Callable[[], Any]) -> None:
        assert self._launched is None, "one slice at a time"
        result = Future[Any]()
        with self._streams.training():
            timing = self._stopwatch(time.perf_counter)
            try:
                result.set_result(work())
            except RuntimeError as error:
                result.set_exception(error)
            timing.stop()
        self._launched = result, timing

    def poll(self, wait: bool = False) -> tuple[Any, float] | None:
        """(result, seconds) of the slice, once, when the device has done it (or after waiting). Raises what it raised.

        The error of a launch is raised when the device has done what was launched before it.
        """
        if self._launched is None:
            return None
        result, timing = self._launched
        if wait:
            timing.wait()
        elif not timing.done():
            return None
        self._launched = None
        return result.result(), timing.seconds()
