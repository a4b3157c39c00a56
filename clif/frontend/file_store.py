"""Uploaded files on their way into RUN/files: copied, read row by row, and tokenised, in a thread.

A file is there once the control process has registered it; what lies in the folder and is not registered is removed
when the run starts again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from clif.config import Config
from clif.data.uploads import UploadedRows
from clif.jobs.samples import PIECE, rows_path, samples_path, write_samples
from clif.jobs.store import new_id
from clif.storage.disk_space import free_bytes
from clif.tokenizer import ChatTokenizer
from clif.types import TrainSample

T = TypeVar("T")
COPY_BYTES = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Stored:
    """A file that was read without a mistake. rows, tokens: of its samples; longest: tokens of the longest."""

    id: str
    bytes: int
    rows: int
    tokens: int
    longest: int


class FileStore:
    """One file after the other: reading many at the same time would take the time of answers.

    The thread has the usual priority: one of a lower priority would be set aside while it has Python's lock.
    """

    def __init__(self, config: Config, tokenizer: ChatTokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._run_dir = config.run_dir
        self._thread = ThreadPoolExecutor(1, "files")

    async def take(self, source: BinaryIO) -> Stored:
        """Keep a file and its samples. Raises InputError for rows that cannot be used, and OSError.

        A disk that would have less free than jobs.min_free_gib counts as full.
        """
        return await self._in_thread(lambda: self._take(source))

    async def remove(self, id: str) -> None:
        await self._in_thread(lambda: self._remove(id))

    async def check_room(self, size: int) -> None:
        """Raises OSError (ENOSPC) if the disk has no room for a file of so many bytes."""
        await asyncio.to_thread(self._check_room, size)

    def path(self, id: str) -> Path:
        """Of the rows as they were uploaded."""
        return rows_path(self._run_dir, id)

    def _take(self, source: BinaryIO) -> Stored:
        id, jobs = new_id("file"), self._config.jobs
        path = self.path(id)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
                self._check_room(source.seek(0, os.SEEK_END))
                source.seek(0)
                shutil.copyfileobj(source, target, COPY_BYTES)
                target.flush()
                os.fsync(target.fileno())
            longest = min(self._config.data.max_sample_tokens, self._config.model.max_context)
            rows = UploadedRows(path, self._tokenizer, longest, jobs.max_rows)
            write_samples(samples_path(self._run_dir, id), self._while_room(rows.samples()))
        except BaseException:
            self._remove(id)
            raise
        return Stored(id, path.stat().st_size, rows.rows, rows.tokens, rows.longest)

    def _check_room(self, size: int) -> None:
        # jobs.db, the journal and the checkpoints are on the same disk: a full one there ends the run.
        if free_bytes(self._run_dir) - size < self._config.jobs.min_free_gib * GIB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _while_room(self, samples: Iterable[TrainSample]) -> Iterator[TrainSample]:
        """How long they are is known only when they are there."""
        for number, sample in enumerate(samples):
            if number % PIECE == 0:
                self._check_room(0)
            yield sample

    def _remove(self, id: str) -> None:
        for path in (self.path(id), samples_path(self._run_dir, id)):
            path.unlink(missing_ok=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
