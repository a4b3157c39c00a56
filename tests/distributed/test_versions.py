"""Versions on real ranks: one step for all of a replica, and one start for all members of a round."""

from __future__ import annotations

import bodies_versions
import pytest
import torch
from ranks import run_ranks


@pytest.fixture
def paths(tiny_config, data, tmp_path):
    return f"random:{tiny_config}", data, str(tmp_path)


def test_promise_4_all_ranks_of_a_replica_go_back_at_the_same_step_and_each_request_keeps_its_version(paths):
    alone = run_ranks(1, bodies_versions.switch_while_requests_run, *paths)[0]
    found = run_ranks(2, bodies_versions.switch_while_requests_run, *paths, layout={"tp_size": 2})
    assert found[0]["switched"] == found[1]["switched"]
    assert [version for version, _ in found[0]["switched"]] == [1, 2, 1, 0]
    for rank in (*found, alone):
        assert rank["versions"] == {0: [2], 1: [1], 2: [3], 3: [0], 4: [0], 5: [1], 6: [0]}
        assert rank["answers"] == alone["answers"]
        assert rank["answers"][1] == rank["answers"][5] != rank["answers"][0], "by name and as the active one"
        assert rank["answers"][3] == rank["answers"][6] and not rank["answers"][4]
        assert rank["failed"] == "adapter version 9 is not kept any more: ask for another one"
        assert rank["held"] == [(1,), (1, 2), (1, 2, 3), (1, 3), ()] and rank["settled"] == [1, 2, 1, 0]
        assert rank["left"] == ((), ())


def test_every_member_begins_from_the_base_of_the_plan_bit_for_bit(paths):
    first, second = run_ranks(2, bodies_versions.rounds_from_a_plans_base, *paths)
    for base in (0, 1, 2):
        assert torch.equal(first["begun"][base], second["begun"][base])
        assert torch.equal(first["begun"][base], first["masters"][base])
    assert not torch.equal(first["masters"][1], first["masters"][2])


@pytest.mark.parametrize("version", [1, 0])
def test_a_rebuilt_replica_serves_what_an_operator_went_back_to_and_counts_all_samples(paths, version):
    (found,) = run_ranks(1, bodies_versions.rebuilt_after_going_back, *paths, version)
    assert found["built"] == [0, 1] and found["active"] == version
    assert found["shadow"] and found["same"], "weights of before, moments and samples of the last round"


def test_a_round_from_a_version_that_is_not_held_fails_and_serving_goes_on(paths):
    error, finish = run_ranks(1, bodies_versions.round_from_a_version_that_is_not_held, *paths)[0]
    assert error == "adapter version 7, which the round begins from, is not held here" and finish == "length"


def test_a_promoted_version_can_be_published_after_the_shadow_has_moved_on(paths):
    assert run_ranks(1, bodies_versions.second_publisher, *paths) == [True]
