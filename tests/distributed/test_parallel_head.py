"""Ranks that share the output head choose the tokens and find the losses that one rank does."""

from __future__ import annotations

import json
from typing import Any

import bodies_head
import bodies_tp
import pytest
import torch
from bodies_tp import assert_equal
from conftest import TINY
from ranks import run_ranks

from clif.models.shard import Shard, uneven_shard
from clif.training.head_loss import HEAD_PIECES
from clif.types import NO_TOKEN


@pytest.fixture(scope="module")
def chosen_alone() -> dict[str, Any]:
    return run_ranks(1, bodies_head.choices)[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_vocabulary_parallel_head_samples_the_same_tokens(chosen_alone, size):
    """Greedy, with equals on several ranks, with NaN, and drawn with seeds beside greedy rows."""
    for found in run_ranks(size, bodies_head.choices, layout={"tp_size": size}):
        for what, expected in chosen_alone.items():
            same = torch.equal(found[what], expected) if isinstance(expected, torch.Tensor) else found[what] == expected
            assert same, what


def test_of_equal_logits_the_first_column_is_chosen_and_where_there_is_nan_none(chosen_alone):
    for tied in (False, True):
        greedy = chosen_alone[f"greedy, tied {tied}"]
        assert greedy == chosen_alone[f"whole, tied {tied}"].argmax(-1).tolist()
        assert greedy[4] == 0 and max(greedy) < 101, "rows are there three times: never the second or the third"
        assert chosen_alone[f"NaN row, tied {tied}"] == [*greedy[:2], NO_TOKEN, *greedy[3:]]
    assert all(chosen_alone[f"NaN column {c}"] == [NO_TOKEN] * 6 for c in (0, 150, 300))


def test_a_row_that_nobody_can_draw_from_gives_no_token_on_any_rank():
    (expected,) = run_ranks(1, bodies_head.draw_from_nan)
    assert expected[0] >= 0 and expected[1] == NO_TOKEN
    assert run_ranks(3, bodies_head.draw_from_nan, layout={"tp_size": 3}) == [expected] * 3


def test_ranks_agree_on_constraints_biases_and_log_probabilities_and_on_what_cannot_go_on(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 1}))
    model = f"random:{tmp_path / 'config.json'}"
    (alone,) = run_ranks(1, bodies_head.guided, model, False)
    assert alone[4]["end"] == "failed" and not alone[4]["tokens"]
    assert all(len(alone[i]["top"]) == (len(alone[i]["tokens"]) if i in (0, 2, 3) else 0) for i in alone)
    first, second = run_ranks(2, bodies_head.guided, model, True, layout={"tp_size": 2})
    for i, expected in alone.items():
        assert torch.equal(first[i]["logprobs"], second[i]["logprobs"])
        for found in (first[i], second[i]):
            assert torch.allclose(found.pop("logprobs"), expected["logprobs"], atol=1e-4)
            assert found == {name: value for name, value in expected.items() if name != "logprobs"}


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradient_of_a_shared_head_are_those_of_one_rank(tied):
    (alone,) = run_ranks(1, bodies_head.losses, tied)
    for size in (2, 3, 4):
        results = run_ranks(size, bodies_head.losses, tied, layout={"tp_size": size})
        for found in results:
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert (found["gradient"] - alone["gradient"]).norm() <= 1e-5 * alone["gradient"].norm()
            assert found["broken"] != found["broken"], "NaN is seen by all"
            assert torch.equal(found["gradient"], results[0]["gradient"])
        assert sum(found["held"] for found in results) == alone["held"] == bodies_head.VOCABULARY


@pytest.mark.parametrize("tied", [False, True])
def test_three_ranks_with_a_vocabulary_that_three_does_not_divide_serve_and_train_as_one(tmp_path, tied):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**TINY, "num_key_value_heads": 3, "vocab_size": 301, "tie_word_embeddings": tied}))
    (alone,) = run_ranks(1, bodies_tp.serve_and_train, f"random:{file}", "fused")
    for found in run_ranks(3, bodies_tp.serve_and_train, f"random:{file}", "fused", layout={"tp_size": 3}):
        assert_equal(found, alone)


def test_there_is_one_all_reduce_per_attention_and_one_per_mlp_and_few_of_the_head(tiny_config):
    for found in run_ranks(2, bodies_head.communication, f"random:{tiny_config}", layout={"tp_size": 2}):
        layers = found["layers"]
        assert found["forward alone"] == {"all_reduce_": 2 * layers}
        assert found["greedy step"] == {"all_reduce_": 2 * layers + 1, "broadcast_bytes": 1}, (
            "the best of each rank, which nobody has to be told"
        )
        assert found["step that draws"] == {"all_reduce_": 2 * layers + 2, "broadcast_": 1, "broadcast_bytes": 1}, (
            "the best of each rank, whole rows of those that draw, and what was drawn"
        )
        blocks = -(-sum(sample.targets for sample in bodies_head.SAMPLES) // HEAD_PIECES["cpu"].rows)
        # Nothing below the first layer's attention learns: its gradient goes no further down.
        forward, backward = {"all_reduce_": 2 * layers}, {"all_reduce_": 2 * layers - 1}
        training = {"forward": forward, "head": {"all_reduce_": 2 * blocks}, "backward": backward}
        assert found["training"] == {"pack": {}, **training}
        assert found["evaluation"] == {"pack": {}, "evaluate": forward, "evaluate_head": {"all_reduce_": blocks}}


def test_shares_differ_by_one_row_at_most_and_cover_all():
    assert [uneven_shard(7, r, 3) for r in range(3)] == [Shard(0, 2, 7), Shard(2, 4, 7), Shard(4, 7, 7)]
    for total in (300, 301, 302, 49152):
        for size in (1, 2, 3, 4, 7):
            shards = [uneven_shard(total, r, size) for r in range(size)]
            assert [s.start for s in shards] == [0, *(s.stop for s in shards[:-1])] and shards[-1].stop == total
            assert {s.size for s in shards} <= {total // size, -(-total // size)}
