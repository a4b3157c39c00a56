"""Promise 5 under full load, in virtual time: the real control server, scheduler, cost model and strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from control_run import make_config
from simulated_engine import BEGIN_S, Streams, simulate, trace

from clif.control.policy.backlog_updates import INTERVAL_S
from clif.control.sources import Source
from clif.engine.coserving.backlog import STALE_S

SLOTS = 8
FULL_LOAD: dict[str, Callable[[], Source]] = {
    "as many users as slots": lambda: Streams(SLOTS, 160),
    "users who wait for a slot": lambda: Streams(2 * SLOTS, 160),
    "at random times": lambda: trace(np.cumsum(np.random.default_rng(1).exponential(1 / 20, 160))),
    "in bursts of more than there are slots": lambda: trace([float(i // 20) for i in range(160)]),
}


def config_in(folder: Path):
    return make_config(
        folder,
        run={"max_s": 300.0, "linger_s": 0.0},
        engine={"max_batch": SLOTS, "kv_tokens": 4096, "coserving": "interleaved", "max_prefill_tokens": 64},
        slo={"ttft_ms": 1000.0, "tpot_ms": 60.0},
        federation={"rounds": None, "min_members": 1, "round_timeout_s": 1000.0},
        load={"kind": "constant", "rate_rps": 1.0, "duration_s": 2.0, "max_tokens": 8},
        quality={"exact_match_rows": 0},
    )


@pytest.mark.parametrize("load", FULL_LOAD.values(), ids=FULL_LOAD)
def test_a_full_batch_trains_and_no_request_loses_what_serving_alone_would_give_it(
    load: Callable[[], Source], tmp_path: Path
) -> None:
    alone, together = (simulate(config_in(tmp_path), load(), trains) for trains in (False, True))
    assert alone.met.keys() == together.met.keys()
    assert all(alone.met.values()), "it is a load that can be served"
    assert all(together.met.values())
    full = [step for step in together.steps if step.full]
    assert sum(step.train_s for step in full) > 0
    updates = together.updates_s
    assert max(np.diff(updates), default=0) < STALE_S
    assert len(updates) <= (updates[-1] - updates[0]) / INTERVAL_S + 2, "told only as often as it helps"


@pytest.mark.parametrize("streams", [SLOTS, SLOTS + 4])
def test_rounds_go_on_while_the_batch_is_full_all_the_time(streams: int, tmp_path: Path) -> None:
    """Whether a replica has slack for a round is a matter of its time, not of its slots."""
    outcome = simulate(config_in(tmp_path), Streams(streams, 240), trains=True, forwards=20)
    begin_s = outcome.opened_s + BEGIN_S + 1.0
    full = [step for step in outcome.steps if step.full and step.at_s > begin_s]
    assert all(outcome.met.values()) and sum(step.train_s for step in full) > 1.0


def test_training_gets_nothing_while_more_comes_than_can_be_served(tmp_path: Path) -> None:
    """Three times as much: training has its floor, which is zero, as soon as the first request would be late."""
    load = trace([i / 60 for i in range(300)])
    outcome = simulate(config_in(tmp_path), load, trains=True)
    assert not all(outcome.met.values()), "the first tokens of most requests are late whatever training does"
    begin_s = outcome.opened_s + BEGIN_S
    overdue = [step for step in outcome.steps if begin_s + 1.0 < step.at_s < begin_s + 4.5]
    assert len(overdue) > 100 and not any(step.train_s for step in overdue)
    assert {step.limit for step in overdue} == {"queued"}


def test_a_full_batch_does_not_train_if_the_control_process_says_nothing(tmp_path: Path) -> None:
    outcome = simulate(config_in(tmp_path), Streams(SLOTS, 80), trains=True, deaf=True)
    full = [step for step in outcome.steps if step.full]
    assert len(full) > 20 and not any(step.train_s for step in full)
    assert {step.limit for step in full} - {"", "first_token"} == {"full"}
