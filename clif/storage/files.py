"""Writes files of a run's folder: atomically, and private to their owner. Free of torch."""

from __future__ import annotations

import os
import resource
from pathlib import Path

OTHERS = 0o077
"""Permissions that only the owner has: the files hold prompts and weights."""


def keep_private() -> None:
    """From here on this process creates files of mode 0600 and folders of mode 0700.

    Call it only in a process that writes to nothing but a run's folder: a model cache may be shared with other users.
    """
    os.umask(OTHERS)


def keep_from_others(folder: Path) -> None:
    """Make an existing folder and all of its content private. Raises OSError."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~OTHERS & 0o777)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file as a whole: readers see the old or the new content. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content)
    os.replace(temporary, path)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 and flush it to the disk. Raises OSError."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def allow_connections() -> None:
    """Raise the limit of open files as far as the system allows: a connection holds one.

    In the control process, connections without a key could otherwise use up the files that the run itself needs.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
