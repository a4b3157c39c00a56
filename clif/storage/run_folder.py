"""The folder of a run: its choice at the start, and its removal if nothing ran. Free of torch.

Rank 0 alone decides, and holds the folder's lock before it changes anything in it.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from clif.config import Config, ConfigError
from clif.distributed.rendezvous import KeyValues
from clif.storage.folder_lock import WAIT_S, FolderLock

log = logging.getLogger(__name__)
RUN_DIR = "clif/run_dir"
CONFIG_FILE = "config.json"
STATUS_FILE = "status.json"
HTTP_ADDRESS_FILE = "http.address"
"""Both are there for other processes: the run as it is, and where its server is."""
UNUSED_FILE = "unused"
"""Marks a folder from its creation until a run begins in it."""
PRIVATE = 0o700
RESTART_WAIT_S = 60.0
"""Longer, because the launcher is still ending the processes of the previous start."""


@dataclass
class RunFolder:
    """A run's folder, as a rank uses it.

    restarted: by the launcher. made: this launch has created it and may remove it. lock: on rank 0 only.
    """

    path: Path
    restarted: bool
    made: bool = False
    lock: FolderLock | None = None

    def leave(self) -> None:
        """Print where the files are, or remove a folder in which nothing ran. On rank 0, after its control process."""
        if self.lock is None:
            return
        lock, self.lock = self.lock, None
        if self.made and not began(self.path):
            log.info("nothing ran: %s is removed", self.path)
            # Ranks that are about to be killed may still write to it.
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            log.info("run folder: %s", self.path)
        lock.close()


def take_folder(config: Config, launch: KeyValues) -> RunFolder:
    """The folder of this start, locked.

    A restart by the launcher continues in the folder of the previous start; run.resume takes the folder of run.name;
    otherwise the folder is a new one. launch: the store that outlives restarts. Raises InputError.
    """
    try:
        if launch.check([RUN_DIR]):
            folder = RunFolder(Path(launch.get(RUN_DIR).decode()), restarted=True, made=not config.run.resume)
            if not folder.path.exists():
                folder.path.mkdir(PRIVATE)
                (folder.path / UNUSED_FILE).touch(0o600)
            folder.lock = FolderLock(folder.path, RESTART_WAIT_S)
        elif config.run.resume:
            folder = RunFolder(config.run_dir, restarted=False)
            if not (folder.path / CONFIG_FILE).is_file():
                raise ConfigError(
                    f"run.resume: {folder.path} holds no run: correct run.name or run.out_dir, or start anew"
                )
            folder.lock = FolderLock(folder.path, WAIT_S)
        else:
            folder = RunFolder(_make(config.run_dir), restarted=False, made=True)
            folder.lock = FolderLock(folder.path)
    except OSError as error:
        where = error.filename or config.run_dir
        raise ConfigError(
            f"the run's folder cannot be used: {where}: {error.strerror}: set run.out_dir and run.name"
        ) from error
    launch.set(RUN_DIR, str(folder.path))
    log.info("run folder: %s", folder.path)
    return folder


def _make(wanted: Path) -> Path:
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for n in range(1, 10_000):
        path = wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}")
        try:
            path.mkdir(PRIVATE)
            (path / UNUSED_FILE).touch(0o600)
        except FileExistsError:
            continue
        if n > 1:
            log.info("%s is of an earlier start: this one takes %s (run.resume=true would go on there)", wanted, path)
        return path
    raise ConfigError(f"{wanted} and 9,998 names after it are taken: set run.name, or remove old runs")


def begin(folder: Path) -> None:
    """Note that all replicas have arrived: from now on the folder is kept. Raises OSError."""
    (folder / UNUSED_FILE).unlink(missing_ok=True)


def began(folder: Path) -> bool:
    """Whether all replicas of a run have ever arrived in this folder: before that there is nothing to keep."""
    return not (folder / UNUSED_FILE).exists()
