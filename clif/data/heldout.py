"""The rows of a run and their splits: given by the data, or held out by share. Free of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from clif.config import Config, DataConfig
from clif.data.instruct import DataError, Row, read_rows, split_rows


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

    A share of the different prompts is held out, at least one and never all. The choice depends on the seed and the
    prompts, not on the order of rows. All rows of a prompt have the same split: none is both trained on and held out.
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


@dataclass(frozen=True)
class HeldoutParts:
    """The two parts of the held-out rows. gate: decides which adapter is promoted. report: measures quality.

    The gate chooses what is promoted, so the loss there is biased low: quality needs other rows.
    """

    gate: tuple[Row, ...]
    report: tuple[Row, ...]

    @property
    def shared(self) -> bool:
        """Whether both parts share the only prompt."""
        return bool(self.gate) and self.gate == self.report


def heldout_parts(rows: Sequence[Row], config: Config) -> HeldoutParts:
    """data.heldout_rows of the held-out rows, drawn by run.seed, half of their prompts for each part.

    All rows of a prompt go together. Without training nothing is promoted, and all are for the report. Raises DataError
    if there is no such row and training needs some.
    """
    held = _drawn(rows, config, needed=config.train.enabled)
    used = tuple(row for _, row in held[: config.data.heldout_rows])
    prompts = sorted({digest for digest, _ in held[: config.data.heldout_rows]})
    if not config.train.enabled:
        return HeldoutParts((), used)
    if len(prompts) < 2:
        return HeldoutParts(used, used)
    out = set(prompts[: (len(prompts) + 1) // 2])
    gate = sum(digest in out for digest, _ in held[: len(used)])
    return HeldoutParts(used[:gate], used[gate:])


def probe_rows(rows: Sequence[Row], config: Config) -> list[Row]:
    """quality.exact_match_rows of the held-out rows whose prompts decide no promotion, drawn by run.seed.

    Raises DataError if there are fewer.
    """
    count = config.quality.exact_match_rows
    if not count:
        return []
    deciding = {json.dumps(row.messages) for row in heldout_parts(rows, config).gate}
    held = [row for _, row in _drawn(rows, config, needed=True)]
    free = [row for row in held if json.dumps(row.messages) not in deciding] or held
    if len(free) < count:
        raise DataError(
            f"quality.exact_match_rows {count} exceeds the {len(free)} held-out rows that decide no promotion, of "
            f"{len(held)}: lower it or data.heldout_rows, or hold out more rows"
        )
    return free[:count]


def _drawn(rows: Sequence[Row], config: Config, needed: bool) -> list[tuple[bytes, Row]]:
    """The held-out rows in an order drawn by run.seed, rows of one prompt together, each with its prompt's digest."""
    held = split_rows(rows, config.data.heldout_split, needed)
    return sorted(((_digest(row, f"parts/{config.run.seed}"), row) for row in held), key=lambda d: (d[0], d[1].id))


def _digest(row: Row, seed: int | str) -> bytes:
    return hashlib.sha256(f"{seed}/{json.dumps(row.messages)}".encode()).digest()
