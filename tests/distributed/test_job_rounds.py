"""Rounds of several training jobs on one replica, with a small real engine."""

from __future__ import annotations

from pathlib import Path

import bodies_jobs
import pytest
from bodies_jobs import equal
from ranks import run_ranks


@pytest.fixture
def model(tiny_config: Path) -> str:
    return f"random:{tiny_config}"


def in_turn(model, data, folder, order, **options):
    folder.mkdir()
    return run_ranks(options.pop("world", 1), bodies_jobs.jobs_in_turn, model, data, str(folder), order, **options)


@pytest.mark.parametrize("tp_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_that_takes_turns_with_others_trains_as_if_it_were_alone(model, data, tmp_path, tp_size):
    """Also through rounds that are discarded; on each rank. Slow with two ranks: three starts of both."""
    turns = [("a", True), ("b", True), ("", True), ("a", False), ("b", True), ("a", True)]
    options = {"world": tp_size, "layout": {"tp_size": tp_size}}
    together = in_turn(model, data, tmp_path / "all", turns, **options)
    for i, job in enumerate(("a", "")):
        alone = in_turn(model, data, tmp_path / str(i), [turn for turn in turns if turn[0] == job], **options)
        for rank, states in enumerate(alone):
            assert equal(states[job], together[rank][job]), f"job {job!r}, rank {rank}"
            assert states[job]["steps"] > 0 and states[job]["cursor"]["committed"] > 0


def test_a_job_with_its_own_adapter_leaves_the_answers_of_clif_as_they_are(model, data, tmp_path):
    (found,) = run_ranks(1, bodies_jobs.a_job_with_its_own_adapter, model, data, str(tmp_path))
    assert found["after"] == found["before"] and found["active"] == 1
    assert found["held"] == (1, 4), "the job's own version is held beside it"
    losses = [vote.active_loss for vote in found["votes"]]
    assert losses[0] > found["votes"][0].candidate_loss == pytest.approx(losses[1])
    assert found["votes"][1].candidate_loss == pytest.approx(losses[2]), "each round competes with the last version"


def test_jobs_of_one_adapter_go_on_from_what_the_others_have_made(model, data, tmp_path):
    (found,) = run_ranks(1, bodies_jobs.jobs_of_an_adapter, model, data, str(tmp_path))
    assert found["active"] == found["shadow"] == 3
    first, other, last = found["votes"]
    assert first.tokens == last.tokens != other.tokens, "each job has held-out rows of its own"
    assert last.active_loss != pytest.approx(first.candidate_loss), "version 2 is not what version 1 was"


def test_a_job_goes_on_from_its_last_committed_round_after_a_restart(model, data, tmp_path):
    (found,) = run_ranks(1, bodies_jobs.resumed_job, model, data, str(tmp_path))
    before, after = found["before"], found["after"]
    assert equal(before["moments"], after["moments"]) and before["steps"] == after["steps"] == 6
    assert before["cursor"] == after["cursor"] and after["cursor"]["committed"] == 12
    assert all(".a." not in name for name in found["left"]), "what is over leaves no files"


def test_a_round_without_its_samples_breaks_and_the_next_one_goes_through(model, data, tmp_path):
    (found,) = run_ranks(1, bodies_jobs.samples_that_are_not_there, model, data, str(tmp_path))
    assert found["error"] == "the samples of job a are not here" and found["vote"].finite


def test_a_replica_without_data_of_its_own_trains_what_clients_bring(model, tmp_path):
    (found,) = run_ranks(1, bodies_jobs.without_own_data, model, str(tmp_path))
    assert found["active"] == 2 and found["votes"][0].tokens == 4 and found["steps"] == [6, 6]
    assert found["votes"][1].active_loss == pytest.approx(found["votes"][0].candidate_loss)
