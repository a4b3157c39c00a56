"""How a rank hears that it must leave: SIGTERM or SIGINT, from torchrun, another launcher or a person.

The signal only asks: the control process lets what runs come to its end and then says Stop. But a rank may hang in a
collective with one that is gone, and then runs no Python code. So a thread sees to it that it leaves in time.
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
"""After a drain: how long a rank waits for Stop."""
HANGS_S = 2.0
"""After that: how long it may take to close its files."""


class SignalWatcher:
    """From its construction on, SIGTERM and SIGINT are requests. Make it in the main thread.

    drain_s: longest drain, seconds. While not `serving`, nothing is lost by leaving at once, and that is what happens.
    on_signal: called once with the signal's name, by the thread: before a rank leaves, or in place of it.
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
        # Python writes the number there at once, also when the main thread is in the middle of a call into torch.
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()

    @property
    def late(self) -> bool:
        """Whether Stop should have come by now."""
        return bool(self.signal) and time.monotonic() - self._asked_s > self._drain_s + LATE_S

    def _watch(self, read: int) -> None:
        number = os.read(read, 1)[0]
        self._asked_s, self.signal = time.monotonic(), signal.Signals(number).name
        self.on_signal(self.signal)
        if self.serving:
            time.sleep(max(0.0, self._asked_s + self._drain_s + LATE_S + HANGS_S - time.monotonic()))
            log.error("this rank still hangs %.0f s after %s: it leaves", time.monotonic() - self._asked_s, self.signal)
        os._exit(EXIT_CODE)
