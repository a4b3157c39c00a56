"""A federated round from a member's side, on real gloo ranks with a small real engine: promises 2 and 8."""

from __future__ import annotations

import json
from pathlib import Path

import bodies
import bodies_discards
import pytest
import torch
from helpers import relative_error
from ranks import run_ranks

from clif.control.records import product_error


@pytest.fixture
def model(tiny_config: Path) -> str:
    return f"random:{tiny_config}"


def test_round_is_averaged_promoted_and_reaches_replicas_outside_it(model, data, tmp_path):
    results = run_ranks(3, bodies.whole_round, model, data, str(tmp_path))
    assert [r["settled"] for r in results] == [1, 1, 1]
    assert all(r["long"] == {0} for r in results), "promise 2: the long request ran through the promotion"
    assert results[0]["after"] == results[1]["after"] == results[2]["after"] != results[0]["before"]
    assert torch.equal(results[0]["shadow"], results[1]["shadow"])
    assert torch.equal(results[0]["shadow"], results[2]["shadow"]), "replicas outside go on from the same shadow"
    assert [r["committed"] for r in results] == [24, 24, 0], "samples count once, when their round is settled"
    vote = results[0]["vote"]
    assert vote.finite and vote.candidate_loss < vote.active_loss
    assert results[0]["result"].samples == 24
    assert 0 < product_error([r["vote"] for r in results[:2]]) < 10
    assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("layout", [{}, {"replica_gpus": [[0, 5], [1, 3], [2, 4]]}])
def test_product_error_of_a_round_is_exact_for_members_of_unequal_weight(model, data, tmp_path, layout):
    """Also for replicas of two ranks, whose second ranks are in another order than their replicas."""
    results = run_ranks(6 if layout else 3, bodies.round_of_unequal_members, model, data, str(tmp_path), layout=layout)
    members = [r for r in results if r["leads"]]
    samples = [r["samples"] for r in members]
    assert samples == [4, 8, 12]
    names = {key.removesuffix(".lora_A.weight") for key in members[0]["mine"] if key.endswith(".lora_A.weight")}
    factors = [{n: (r["mine"][f"{n}.lora_A.weight"], r["mine"][f"{n}.lora_B.weight"]) for n in names} for r in members]
    expected = relative_error(factors, [n / sum(samples) for n in samples])
    assert product_error([r["vote"] for r in members]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("half", "step"), [(1.0, 0.5), (4.0, 1.0)])
def test_members_judge_an_average_that_is_no_better_at_half_of_the_way_and_propose_what_is_better(
    model, data, tmp_path, half, step
):
    first, second = run_ranks(2, bodies_discards.half_step_round, model, data, str(tmp_path), half)
    assert torch.equal(first["after"], second["after"])
    for found in (first, second):
        vote = found["vote"]
        assert vote.finite and (vote.active_loss, vote.candidate_loss, vote.outer_step) == (2.0, min(half, 3.0), step)
        assert torch.allclose(found["half"], (found["base"] + found["average"]) / 2)
        assert torch.equal(found["after"], found["half"] if step == 0.5 else found["average"])


def test_broken_member_neither_poisons_the_average_nor_keeps_its_own(model, data, tmp_path):
    broken, whole = run_ranks(2, bodies.round_with_a_broken_member, model, data, str(tmp_path))[::-1]
    assert not broken["result"].finite and broken["result"].samples == 0
    assert whole["result"].finite and whole["result"].samples == 12
    assert torch.equal(whole["average"], broken["average"])
    assert torch.allclose(whole["average"], whole["mine"]), "only the whole member's weight was sent"
    assert whole["vote"].finite
    assert torch.equal(broken["after"][6:], whole["after"][6:]), "discarding gives both the shadow of before the round"


def test_the_rows_that_decide_a_promotion_are_not_those_that_quality_is_measured_on(model, data, tmp_path):
    (found,) = run_ranks(1, bodies.gate_and_report, model, data, str(tmp_path))
    assert found["vote"] == pytest.approx(found["gate"]) and found["reported"] == pytest.approx(found["report"])
    assert found["vote"] != pytest.approx(found["reported"])


def test_discarded_round_leaves_no_trace(model, data, tmp_path):
    (result,) = run_ranks(1, bodies.discard_in_the_middle, model, data, str(tmp_path))
    assert result["settled"] == 0 and result["undone"]
    assert result["result"].steps == 2


@pytest.fixture
def smallest(tmp_path: Path, tiny_config: Path) -> tuple[str, str]:
    """(model, data): one layer, and one row of either kind."""
    shape = json.loads(tiny_config.read_text())
    shape |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    rows = [{"instruction": "a", "output": "b", "split": split} for split in ("train", "train", "test", "test")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"random:{tmp_path / 'config.json'}", str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("rounds", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_discarded_rounds_leave_no_descriptor_and_no_thread_behind(smallest, tmp_path, rounds):
    for held in run_ranks(2, bodies_discards.discarded_rounds, *smallest, str(tmp_path), rounds, limit_s=240):
        assert held["last"][0] <= held["first"][0] and held["last"][1] <= held["first"][1], held
        assert held["most"][0] <= held["first"][0] + 15 and held["most"][1] <= held["first"][1] + 8, held


def test_broken_round_ends_for_the_member_and_its_serving_goes_on(model, data, tmp_path):
    (result,) = run_ranks(1, bodies.broken_round, model, data, str(tmp_path))
    assert result == {"error": "out of memory", "undone": True, "finish": "length"}


def test_a_step_that_is_under_way_when_the_time_is_up_is_cut_and_what_was_trained_counts(model, data, tmp_path):
    (result,) = run_ranks(1, bodies.steps_cut_in_the_middle, model, data, str(tmp_path))
    assert (result["samples"], result["steps"]) == (12, 3)
    assert result["cursor"]["committed"] == 12 and len(result["cursor"]["released"]) == 4, "they come again first"


def test_smaller_batches_mean_more_steps_and_not_less_training(model, data, tmp_path):
    ((samples, steps),) = run_ranks(1, bodies.smaller_batches, model, data, str(tmp_path))
    assert samples == 24 and 11 <= steps <= 12, "one step may have begun with the larger batch"
