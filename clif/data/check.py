"""Reads all inputs of a run before any rank loads the model."""

from __future__ import annotations

from collections.abc import Sequence

from clif.config import Config
from clif.data.heldout import probe_rows, read_data
from clif.data.instruct import DataError, Row, shard_rows, split_rows
from clif.data.load import read_arrivals
from clif.distributed.layout import Layout
from clif.distributed.roles import role_of


def check_inputs(config: Config, layout: Layout) -> None:
    """Raises DataError, TraceError or LoadError, with file and line, for an input that would end the run minutes later.

    A number of rows that exceeds the data is refused, too: the run would silently use fewer.
    """
    if config.data.path is not None:
        rows = read_data(config)
        try:
            _check_rows(config, layout, rows)
        except DataError as error:
            raise DataError(f"{config.data.path}: {error}") from error
    read_arrivals(config.load, config.run.seed)


def _check_rows(config: Config, layout: Layout, rows: Sequence[Row]) -> None:
    data = config.data
    if config.train.enabled:
        _check_shards(config, layout, split_rows(rows, data.train_split))
    if config.load.kind != "none":
        split_rows(rows, config.load.split)
    asked = {"data.heldout_rows": data.heldout_rows or 0, "quality.exact_match_rows": config.quality.exact_match_rows}
    if config.train.enabled or any(asked.values()):
        present = len(split_rows(rows, data.heldout_split))
        for field, count in asked.items():
            if count > present:
                raise DataError(
                    f'{field} asks for {count} rows, but {present} have the split "{data.heldout_split}": lower it, or '
                    "give more rows"
                )
        probe_rows(rows, config)


def _check_shards(config: Config, layout: Layout, rows: Sequence[Row]) -> None:
    replicas = len(layout.replicas)
    trainers = sum(role_of(replica, replicas, config.run).trains for replica in range(replicas))
    shard_rows(rows, config.data.shard, 0, trainers)
