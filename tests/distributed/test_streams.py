"""Serving and training on two streams, proved without a GPU: what each gives work to, and what crosses."""

from __future__ import annotations

import bodies_streams
import pytest
from ranks import run_ranks


# Slow: every operator of a replica's life is looked at.
@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_that_one_stream_writes_is_touched_by_the_other_without_an_order(tiny_config, data, tmp_path, overlap):
    body = bodies_streams.whole_life
    (found,) = run_ranks(1, body, f"random:{tiny_config}", data, str(tmp_path), overlap)
    assert not found["races"]
    assert not found["wrong"], "jobs belong to training, serving steps to serving"
    assert not found["left"], "a replica that is given up leaves nothing on the device"
    assert found["published"] >= 2 and found["beside"] > 20 and found["job"] > 100
    assert found["answers"][4] != found["answers"][5], "the promotion was seen"


@pytest.mark.slow
def test_a_promotion_that_serving_does_not_wait_for_is_found(tiny_config, data, tmp_path):
    """The check itself: it finds the race that publish() prevents."""
    body = bodies_streams.whole_life
    (found,) = run_ranks(1, body, f"random:{tiny_config}", data, str(tmp_path), False, True)
    assert found["races"]
