"""RUN/status.json: the run as it is, once a second, for every host that sees the folder. Free of torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from clif.storage.run_folder import STATUS_FILE

log = logging.getLogger(__name__)
EVERY_S = 1.0


class StatusFile:
    """Replaces the file as a whole, in a thread: the disk of the folder may be slow. wall: seconds since 1970.

    It is not forced to disk, since it says nothing that a later one does not. A write that fails ends nothing.
    """

    def __init__(self, run_dir: Path, wall: Callable[[], float] = time.time) -> None:
        self._path, self._wall = run_dir / STATUS_FILE, wall
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="status")
        self._writing: Future[None] | None = None
        self._next_s = float("-inf")
        self._failed = False

    def due(self, now: float) -> bool:
        """Whether write() would write now; making a body is not free."""
        return now >= self._next_s and (self._writing is None or self._writing.done())

    def write(self, now: float, body: dict[str, Any]) -> None:
        self._next_s = now + EVERY_S
        content = msgspec.json.encode({"written_unix": round(self._wall(), 3), **body})
        self._writing = self._thread.submit(self._replace, content)

    def close(self, now: float, body: dict[str, Any]) -> None:
        """Write what is last, and wait for it."""
        self.write(now, body)
        self._thread.shutdown()

    def _replace(self, content: bytes) -> None:
        temporary = self._path.with_name(f".{STATUS_FILE}.tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
            os.replace(temporary, self._path)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("%s cannot be written: %s", self._path, error)
            self._failed = True
