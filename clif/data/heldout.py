"""The rows that a run reads, with the split of each: its own, or held out by share. Free of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import msgspec

from clif.config import Config, DataConfig
from clif.data.instruct import DataError, Row, read_rows


def read_data(config: Config) -> list[Row]:
    """All rows of data.path, none without it; each with a split if data.heldout_share is set.

    The same in every process of a run. Raises DataError.
    """
    data = config.data
    if data.path is None:
        return []
    rows = read_rows(data.path)
    return rows if data.heldout_share is None else hold_out(rows, data, data.heldout_share, config.run.seed)


def hold_out(rows: Sequence[Row], data: DataConfig, share: float, seed: int) -> list[Row]:
    """The rows with data.heldout_split or data.train_split as their split.

    Of the different prompts, share is held out, at least one and never all; which, depends on the seed and on the
    prompts alone, not on the order of rows. All rows of a prompt go together: none is both trained on and judged by.
    Raises DataError if a row has a split, or if there is only one prompt.
    """
    given = next((row for row in rows if row.split is not None), None)
    if given is not None:
        raise DataError(
            f'{data.path}: row {given.id} (from 0) has the split "{given.split}", but data.heldout_share is for rows '
            'without: remove the field "split" from all rows, or leave data.heldout_share out'
        )
    digests = {row.id: _digest(row, seed) for row in rows}
    ranked = sorted(set(digests.values()))
    if len(ranked) < 2:
        raise DataError(f"{data.path} has one prompt only, so data.heldout_share cannot hold any out: give more rows")
    out = set(ranked[: min(max(round(share * len(ranked)), 1), len(ranked) - 1)])
    return [
        msgspec.structs.replace(row, split=data.heldout_split if digests[row.id] in out else data.train_split)
        for row in rows
    ]


def _digest(row: Row, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{json.dumps(row.messages)}".encode()).digest()
