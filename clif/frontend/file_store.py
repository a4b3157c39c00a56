"""Uploaded files on their way into RUN/files: copied, read row by row, and tokenised, in a thread.

A file is there once the control process has registered it; what lies in the folder and is not registered is removed
when the run starts again.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from clif.config import Config
from clif.data.uploads import UploadedRows
from clif.jobs.samples import rows_path, samples_path, write_samples
from clif.jobs.store import new_id
from clif.tokenizer import ChatTokenizer

T = TypeVar("T")
COPY_BYTES = 2**20


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
        """Keep a file and its samples. Raises InputError for rows that cannot be used, and OSError."""
        return await self._in_thread(lambda: self._take(source))

    async def remove(self, id: str) -> None:
        await self._in_thread(lambda: self._remove(id))

    def path(self, id: str) -> Path:
        """Of the rows as they were uploaded."""
        return rows_path(self._run_dir, id)

    def _take(self, source: BinaryIO) -> Stored:
        id, jobs = new_id("file"), self._config.jobs
        path = self.path(id)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
                source.seek(0)
                shutil.copyfileobj(source, target, COPY_BYTES)
                target.flush()
                os.fsync(target.fileno())
            longest = min(self._config.data.max_sample_tokens, self._config.model.max_context)
            rows = UploadedRows(path, self._tokenizer, longest, jobs.max_rows)
            write_samples(samples_path(self._run_dir, id), rows.samples())
        except BaseException:
            self._remove(id)
            raise
        return Stored(id, path.stat().st_size, rows.rows, rows.tokens, rows.longest)

    def _remove(self, id: str) -> None:
        for path in (self.path(id), samples_path(self._run_dir, id)):
            path.unlink(missing_ok=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
