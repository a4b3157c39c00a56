"""Reads everything that a run will read, before any rank loads a model for it."""

from __future__ import annotations

from clif.config import Config
from clif.data.heldout import read_data
from clif.data.instruct import split_rows
from clif.data.load import read_arrivals


def check_inputs(config: Config) -> None:
    """Raises DataError, TraceError or LoadError, with file and line, for what would else end the run minutes later."""
    if config.data.path is not None:
        rows = read_data(config)
        if config.train.enabled:
            split_rows(rows, config.data.train_split)
        if config.train.enabled or config.quality.exact_match_rows:
            split_rows(rows, config.data.heldout_split)
        if config.load.kind != "none":
            split_rows(rows, config.load.split)
    read_arrivals(config.load, config.run.seed)
