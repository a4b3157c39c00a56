"""Patience with a full disk: writes wait until there is room again, for a bounded time. Free of torch.

A write is repeated, or its content stays in memory; no accepted content is dropped in the meantime.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT)
LIMIT_S = 120.0
"""Seconds for which a disk may be full before that ends the process."""
POLL_S = 0.25
# HDF5 and safetensors report the system's error only in their texts.
_NUMBER = re.compile(r"(?:errno = |os error )(\d+)")


class Room:
    """Waits for room to write to one path. clock: monotonic seconds.

    give_up: gives a reason to stop waiting, or "".
    """

    def __init__(
        self,
        path: Path,
        limit_s: float = LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        give_up: Callable[[], str] = lambda: "",
    ) -> None:
        self._path, self._limit_s, self._clock, self._sleep, self._give_up = path, limit_s, clock, sleep, give_up
        self._since: float | None = None

    def repeat(self, write: Callable[[], T]) -> T:
        """The result of write, once the disk has room. Raises OSError as refused() does, and other errors of write."""
        while True:
            try:
                result = write()
            except Exception as error:
                if not is_full(error):
                    raise
                self.refused(error)
                self._sleep(POLL_S)
            else:
                self.accepted()
                return result

    def refused(self, error: Exception | None = None) -> None:
        """Note that there is no room now. Raises OSError after that has lasted too long."""
        now = self._clock()
        if self._since is None:
            self._since = now
            log.warning("the disk of %s is full: waiting up to %.0f s for room", self._path, self._limit_s)
        if self._give_up() or now - self._since > self._limit_s:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path)) from error

    def accepted(self) -> None:
        """Note that there is room."""
        if self._since is not None:
            log.warning("the disk of %s has room again after %.1f s", self._path, self._clock() - self._since)
            self._since = None


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, or this user's quota, is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    found = _NUMBER.search(str(error))
    return found is not None and int(found[1]) in FULL


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write there."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
