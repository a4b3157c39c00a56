"""A file that a client sends to train on: read row by row, every mistake with its line. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from clif.data.instruct import encode_sample, make_row
from clif.data.lines import json_object
from clif.errors import InputError, plain
from clif.tokenizer import ChatTokenizer
from clif.types import TrainSample

MOST_ERRORS = 20
"""Mistakes that are listed; reading ends with the last of them."""
LONGEST_LINE = 2**22
"""Bytes: no row that fits into a context is as long."""
_BOM = b"\xef\xbb\xbf"


class WrongRows(InputError):
    """The file has rows that cannot be used. errors: a sentence for each, with its line."""

    def __init__(self, errors: list[str]) -> None:
        shown = "\n".join(errors)
        more = f"\nonly the first {MOST_ERRORS} mistakes are listed" if len(errors) >= MOST_ERRORS else ""
        super().__init__(f"{len(errors)} rows cannot be used:\n{shown}{more}" if len(errors) > 1 else shown)
        self.errors = errors


class UploadedRows:
    """The samples of a file of rows, as clif/data/instruct.py takes them.

    max_tokens: of the longest sample. max_rows: of the file. rows, tokens, longest: of the samples up to now.
    """

    def __init__(self, path: Path, tokenizer: ChatTokenizer, max_tokens: int, max_rows: int) -> None:
        self._path, self._tokenizer = path, tokenizer
        self._max_tokens, self._max_rows = max_tokens, max_rows
        self.rows = self.tokens = self.longest = 0

    def samples(self) -> Iterator[TrainSample]:
        """All of them, read once. Raises WrongRows at the end of a file with mistakes, InputError, or OSError."""
        errors: list[str] = []
        for number, line in self._lines():
            try:
                sample = self._sample(line)
            except InputError as error:
                errors.append(f"line {number}: {plain(error)}")
                if len(errors) == MOST_ERRORS:
                    break
                continue
            self._count(sample)
            yield sample
            # Other threads get Python's lock: they carry the answers of other clients.
            time.sleep(0)
        if errors:
            raise WrongRows(errors)
        if not self.rows:
            raise InputError("the file holds no rows: put one JSON object on each line")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise WrongRows([f"line {number}: longer than {LONGEST_LINE // 2**20} MiB: end rows by a newline"])
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield number, line

    def _sample(self, line: bytes) -> TrainSample:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 text (byte {error.start + 1}): convert it") from error
        row = make_row(self.rows, json_object(text, unique=True))
        try:
            return encode_sample(row, self._tokenizer, self._max_tokens)
        except InputError as error:
            # The client knows lines.
            raise InputError(str(error).removeprefix(f"row {row.id}: ")) from error

    def _count(self, sample: TrainSample) -> None:
        self.rows += 1
        if self.rows > self._max_rows:
            raise InputError(f"the file has more than {self._max_rows} rows (jobs.max_rows): split it")
        self.tokens += len(sample.ids)
        self.longest = max(self.longest, len(sample.ids))
