"""SIGTERM and SIGINT, from torchrun, another launcher or a terminal: a rank drains and leaves.

The signal is a request: the control process lets running requests finish and then sends Stop. But a rank may hang in a
collective with a rank that is gone, and then runs no Python code. So a thread ends the process if it does not leave in
time.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)
EXIT_CODE = 128 + signal.SIGTERM
LATE_S = 2.0
"""Seconds that a rank waits for Stop after a drain."""
HANGS_S = 2.0
"""Seconds that it may take after that to close its files."""


class SignalWatcher:
    """From its construction on, SIGTERM and SIGINT are requests. Construct it in the main thread.

    drain_s: longest drain, seconds. A rank that is not `serving` leaves at once, since nothing is lost by that.
    on_signal: called once with the signal's name, by the thread, before the rank leaves.
    """

    def __init__(self, drain_s: float) -> None:
        self.serving = False
        self.signal = ""
        self.on_signal: Callable[[str], None] = lambda _: None
        self._drain_s = drain_s
        self._asked_s = 0.0
        read, write = os.pipe()
        os.set_blocking(write, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        # Python writes the number to the pipe at once, also while the main thread is inside a call into torch.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()

    @property
    def late(self) -> bool:
        """Whether Stop is overdue."""
        return bool(self.signal) and time.monotonic() - self._asked_s > self._drain_s + LATE_S

    def _watch(self, read: int) -> None:
        number = os.read(read, 1)[0]
        self._asked_s, self.signal = time.monotonic(), signal.Signals(number).name
        self.on_signal(self.signal)
        if self.serving:
            time.sleep(max(0.0, self._asked_s + self._drain_s + LATE_S + HANGS_S - time.monotonic()))
            log.error("this rank still hangs %.0f s after %s: it leaves", time.monotonic() - self._asked_s, self.signal)
        os._exit(EXIT_CODE)
