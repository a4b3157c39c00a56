"""A replica that fails is rebuilt in place, from what is on disk, on the weights that it has."""

from __future__ import annotations

from pathlib import Path

import bodies_supervisor
import pytest
from ranks import run_ranks


@pytest.fixture
def model(tiny_config: Path) -> str:
    return f"random:{tiny_config}"


def test_the_next_life_goes_on_from_the_last_committed_round(model, data, tmp_path):
    (result,) = run_ranks(1, bodies_supervisor.fail_in_a_round, model, data, str(tmp_path))
    assert result["trouble"].returning and result["trouble"].error == "OutOfMemoryError: injected"
    assert result["built"] == [0, 1]
    assert result["same"], "shadow, moments' steps and sample cursor are those of the committed round"
    known, again = result["answers"]
    assert known == again and len(known) == 12, "the same adapter answers on the same weights"
    assert result["dropped"] == [], "orders of before Welcome were meant for the incarnation before"
    assert result["freed"], "nothing holds the KV cache of the incarnation before"
    assert result["version"] == 2, "it takes part in rounds again"
    assert result["steps"] > 0, "steps are counted on"


def test_a_replica_that_fails_too_often_gives_its_error_up(model, data, tmp_path):
    ((built, error),) = run_ranks(1, bodies_supervisor.fail_too_often, model, data, str(tmp_path))
    assert built == [0, 1, 2] and error == "injected"


def test_damaged_weights_are_noticed_and_never_serve_again(model, data, tmp_path):
    (error,) = run_ranks(1, bodies_supervisor.damaged_weights, model, data, str(tmp_path))
    assert error.startswith("the base model has changed in memory")


def test_when_one_of_two_ranks_fails_both_are_rebuilt_and_nobody_waits_for_a_timeout(model, data, tmp_path):
    # Collectives give up after longer than run_ranks waits.
    leader, peer = run_ranks(
        2,
        bodies_supervisor.one_of_two_ranks_fails,
        model,
        data,
        str(tmp_path / "run"),
        layout={"tp_size": 2},
        timeout_s=300,
    )
    assert leader["built"] == peer["built"] == [0, 1]
    assert leader["known"] == leader["again"] and len(leader["known"]) == 12
    assert "rank 1 failed: OutOfMemoryError: injected" in leader["trouble"].error


def test_a_member_that_never_comes_to_a_rounds_group_holds_up_no_request(model, data, tmp_path):
    result, _ = run_ranks(2, bodies_supervisor.a_member_that_never_comes, model, data, str(tmp_path), timeout_s=300)
    assert len(result["answered"]) == 12 and result["failed"] is None
    assert result["settled"] == 0
