"""How files of a run's folder are written: as a whole, and for their owner alone. Free of torch."""

from __future__ import annotations

import os
from pathlib import Path

OTHERS = 0o077
"""What nobody but the owner may do: prompts and weights are in these files."""


def keep_private() -> None:
    """From here on this process makes files of mode 0600 and folders of mode 0700.

    Only for a process that writes to a run's folder and nowhere else: a model cache may be shared with others.
    """
    os.umask(OTHERS)


def keep_from_others(folder: Path) -> None:
    """The same for a folder that is there already, and all that is in it. Raises OSError."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~OTHERS & 0o777)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file as a whole: readers see the old or the new content. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_synced(temporary, content)
    os.replace(temporary, path)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 through to the disk. Raises OSError."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
