"""Reads everything that a run will read, before any rank loads a model for it."""

from __future__ import annotations

from clif.config import Config
from clif.data.heldout import read_data
from clif.data.instruct import split_rows
from clif.data.traces import read_trace


def check_inputs(config: Config) -> None:
    """Raises DataError or TraceError, with file and line, for what would otherwise end the run minutes later."""
    if config.data.path is not None:
        rows = read_data(config)
        if config.train.enabled:
            split_rows(rows, config.data.train_split)
        if config.train.enabled or config.quality.exact_match_rows:
            split_rows(rows, config.data.heldout_split)
        if config.load.kind != "none":
            split_rows(rows, config.load.split)
    trace = config.load.trace
    if trace is not None:
        read_trace(
            trace.path, trace.format, trace.speed, trace.start_s, config.load.duration_s, config.load.max_requests
        )
