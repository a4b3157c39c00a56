"""The right to write to a run's folder, for one start at a time. Free of torch.

Rank 0 takes the lock before it changes anything and passes it to the control process. The lock belongs to the open
file, so the system frees it once both processes are gone, whatever ended them. Other hosts see it on file systems that
share locks between hosts (NFS, GPFS, Lustre with -o flock). Elsewhere a growing journal shows a run on another host.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from clif.errors import InputError

log = logging.getLogger(__name__)
LOCK_FILE = "journal.lock"
GROWS_FILE = "journal.jsonl"
WAIT_S = 10.0
"""Seconds for which a start waits until the processes of the previous one are gone."""
WATCH_S = 3.0
"""Seconds for which the journal is watched if the last holder was on another host: it grows once a second."""
POLL_S = 0.05
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class InUse(InputError):
    """Another start writes to the folder; the message says which."""


class FolderLock:
    """Held from construction to close(). Taking it creates or changes only the lock's own file.

    Raises InUse if another start holds it for longer than wait_s, InputError if files cannot be locked, and OSError.
    """

    def __init__(self, folder: Path, wait_s: float | None = None, watch_s: float = WATCH_S) -> None:
        self.folder = folder
        self._file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._wait(WAIT_S if wait_s is None else wait_s)
            self._watch(watch_s)
        except BaseException:
            os.close(self._file)
            raise
        self._sign()

    @classmethod
    def inherited(cls, folder: Path, file: int) -> FolderLock:
        """The parent process's lock, from the number of its open file: held until both processes have closed it."""
        lock = cls.__new__(cls)
        lock.folder, lock._file = folder, file
        lock._sign()
        return lock

    def fileno(self) -> int:
        return self._file

    def close(self) -> None:
        """Closing twice is harmless."""
        if self._file < 0:
            return
        os.close(self._file)
        self._file = -1

    def _wait(self, wait_s: float) -> None:
        deadline, said = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._in_use() from None
            except OSError as error:
                if error.errno in NO_LOCKS:
                    raise InputError(
                        f"files in {self.folder} cannot be locked ({error.strerror}): set run.out_dir to another file "
                        "system (Lustre: mount it with -o flock)"
                    ) from error
                raise
            if not said:
                log.info("waiting for %s, which still uses %s", self._holder(), self.folder)
                said = True
            time.sleep(POLL_S)

    def _watch(self, watch_s: float) -> None:
        """Raises InUse if the last holder was on another host and the journal still grows."""
        _, _, host = self._holder().partition(" on ")
        if host in ("", socket.gethostname()):
            return
        first, deadline = self._size(), time.monotonic() + watch_s
        while time.monotonic() < deadline:
            time.sleep(POLL_S)
            if self._size() != first:
                raise self._in_use()

    def _size(self) -> int:
        # The file is reopened each time: only that makes a network file system ask its server.
        try:
            with (self.folder / GROWS_FILE).open("rb") as file:
                return os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return 0

    def _holder(self) -> str:
        return os.pread(self._file, 200, 0).decode(errors="replace") or "another process"

    def _in_use(self) -> InUse:
        return InUse(f"{self.folder} is in use by {self._holder()}: end that process first, or give another run.name")

    def _sign(self) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
