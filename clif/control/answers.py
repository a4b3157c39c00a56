"""The texts of answers, in a file for the run's owner alone: RUN/answers.jsonl. Never in HDF5.

Invariant: each line is a whole JSON object, also after a kill or a full disk in the middle of one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from clif.control.dispatcher import RequestRecord
from clif.control.quality import Judgement
from clif.types import Purpose

log = logging.getLogger(__name__)
FILE = "answers.jsonl"
SAMPLE = 20
"""metrics.answers sample keeps every request whose id is a multiple of this."""


class Answers:
    """Keeps what was answered. decode: token ids to text.

    Answers to users are kept as `wanted` says. Answers to probes are always kept: a probe is a row of the run's data.
    """

    def __init__(
        self, run_dir: Path, wanted: Literal["none", "sample", "all"], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._path, self._wanted, self._decode = run_dir / FILE, wanted, decode
        self._file: int | None = None
        self._whole = True
        self._failed = False

    def keep(self, record: RequestRecord, judgement: Judgement | None) -> None:
        """Write a request that has ended, if it is wanted and something was answered.

        An answer that cannot be written is logged once and left out: serving continues.
        """
        if not record.tokens or not self._wants(record):
            return
        try:
            self._write(json.dumps(self._row(record, judgement)).encode() + b"\n")
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.warning("answers are left out of %s: %s", self._path, error.strerror)
            self._failed = True

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _wants(self, record: RequestRecord) -> bool:
        if record.request.purpose is Purpose.PROBE or self._wanted == "all":
            return True
        return self._wanted == "sample" and record.request.id % SAMPLE == 0

    def _row(self, record: RequestRecord, judgement: Judgement | None) -> dict[str, Any]:
        row = {
            "id": record.request.id,
            "purpose": record.request.purpose.value,
            "replica": record.replica,
            "version": record.version,
            "finish": None if record.finish is None else record.finish.value,
            "prompt": self._decode(record.request.prompt),
            "answer": self._decode(record.tokens) if record.text is None else record.text,
        }
        if judgement is not None:
            row |= {"expected": judgement.expected, "exact_match": judgement.match}
        return row

    def _write(self, line: bytes) -> None:
        """Write a line at once, after a line break if the last line was torn."""
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            size = os.fstat(self._file).st_size
            self._whole = size == 0 or os.pread(self._file, 1, size - 1) == b"\n"
        if not self._whole:
            line = b"\n" + line
        # Unless the whole line is written it is torn, and the next one begins with a break.
        self._whole = False
        self._whole = os.write(self._file, line) == len(line)
