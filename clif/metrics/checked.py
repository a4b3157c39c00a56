"""Reads tables with their checksums, so that a damaged row is an error and not a figure. Free of torch.

A kill during a flush may leave wrong checksums in the last chunks of a table. Rows of earlier flushes are intact there:
a chunk is rewritten in place, and these rows do not change. So the last chunks of a table are read without checksums if
the file was not closed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Checked:
    """The rows of a data set, by slices. closed: whether its process has closed the file.

    Reading raises OSError for a chunk with a wrong checksum, unless a kill may have caused it.
    """

    def __init__(self, data: Any, closed: bool) -> None:
        self._data, self._closed = data, closed
        self.dtype: np.dtype[Any] = data.dtype

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, rows: slice) -> Array:
        start, stop, _ = rows.indices(len(self))
        try:
            return np.asarray(self._data[start:stop])
        except OSError:
            if self._closed or self._data.chunks is None:
                raise
            whole = self._whole()
            parts = [self._data[start : min(stop, whole)]] if start < whole else []
            parts += [self._unchecked(at, start, stop) for at in range(whole, stop, self._chunk)]
            return np.concatenate(parts)

    @property
    def _chunk(self) -> int:
        return int(self._data.chunks[0])

    def _whole(self) -> int:
        """Rows before the last chunks with wrong checksums."""
        at = (len(self) - 1) // self._chunk * self._chunk
        while at >= 0 and not self._fits(at):
            at -= self._chunk
        return min(at + self._chunk, len(self))

    def _fits(self, at: int) -> bool:
        try:
            self._data[at : at + self._chunk]
        except OSError:
            return False
        return True

    def _unchecked(self, at: int, start: int, stop: int) -> Array:
        _, content = self._data.id.read_direct_chunk((at,))
        # The checksum comes last.
        chunk = np.frombuffer(content[: self._chunk * self.dtype.itemsize], self.dtype)
        return chunk[max(0, start - at) : stop - at]
