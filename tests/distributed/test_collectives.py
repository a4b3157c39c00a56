"""FedAvg over subgroups, on real gloo ranks."""

from __future__ import annotations

import bodies
import pytest
from ranks import run_ranks

from clif.distributed.collectives import FRAME, SIZE


def test_average_is_over_exactly_the_combined_replicas():
    results = run_ranks(4, bodies.mean_over_members, (0, 2, 3), None)
    mean = (1 * 1 + 3 * 3 + 4 * 4) / (1 + 3 + 4)
    assert results[1] is None, "a replica outside the round issues no collective"
    for replica in (0, 2, 3):
        assert results[replica] == pytest.approx([mean] * 5 + [8.0])


def test_member_with_nan_never_poisons_an_average():
    """Promise 8: absent replicas send zeros and weight 0; the divisor is the sum of the weights actually sent."""
    results = run_ranks(3, bodies.mean_over_members, (0, 1, 2), 1)
    assert results == [pytest.approx([(1 + 9) / 4] * 5 + [4.0])] * 3


def test_disjoint_rounds_do_not_disturb_each_other():
    results = run_ranks(4, bodies.two_sets_at_once)
    assert results[0] == results[2] == pytest.approx([(1 + 9) / 4] * 5 + [4.0])
    assert results[1] == results[3] == pytest.approx([(4 + 16) / 6] * 5 + [6.0])


def test_each_shard_is_averaged_with_the_same_shard_of_the_other_replicas():
    results = run_ranks(4, bodies.tensor_parallel_groups, layout={"replica_gpus": [[0, 3], [1, 2]]})
    assert results == [([0], [0.5, 2.0]), ([1], [0.5, 2.0]), ([1], [2.5, 2.0]), ([0], [2.5, 2.0])]


def test_replicas_of_different_histories_find_each_other():
    results = run_ranks(3, bodies.overlapping_sets)
    rounds = {(0, 1): 5 / 3, (1, 2): 13 / 5, (0, 2): 10 / 4, (0, 1, 2): 14 / 6}
    for i, (members, mean) in enumerate(rounds.items()):
        for replica in range(3):
            expected = pytest.approx([mean] * 5 + [sum(m + 1 for m in members)]) if replica in members else None
            assert results[replica][i] == expected


def test_an_all_reduce_that_was_given_up_never_meets_the_next_round():
    assert run_ranks(2, bodies.given_up_all_reduce) == [[0.5] * 4 + [2.0]] * 2


def test_round_without_any_weight_says_so():
    assert run_ranks(2, bodies.absent_everywhere) == [0.0, 0.0]


def test_messages_of_the_leader_reach_its_peers_whole_and_in_order():
    """Promise 4 needs it: what makes a replica switch arrives at all of its ranks in the same step."""
    sizes = [5, 0, FRAME - SIZE, FRAME - SIZE + 1, 100_000, 3]
    for found in run_ranks(2, bodies.leader_speaks, sizes, layout={"tp_size": 2}):
        assert found == bodies.messages_of(sizes)
