"""Clients that misbehave leave nothing behind, and honest ones beside them are answered."""

from __future__ import annotations

import pytest
from http_soak import soak


@pytest.mark.slow
def test_clients_that_misbehave_leave_nothing_behind_and_honest_ones_are_answered(tmp_path):
    """Slow: 15 s of them, and then as long as the server waits for the last one that stalls."""
    verdict = soak(tmp_path, 15.0, "5")
    assert verdict.problems == []
    kinds = {what.split(":")[0] for what in verdict.crowd.seen}
    assert {"honest", "bad key", "bad body", "garbage", "oversize", "endless chunks"} <= kinds
