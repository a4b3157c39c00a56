"""Which job trains next, and when a job is done."""

import pytest

from clif.jobs.model import Hyperparameters, Job, JobStatus
from clif.jobs.policy import GIVE_UP, JobView, choose_job, job_done, joins_at
from clif.jobs.samples import held_out, prompt_digest
from clif.types import TrainSample


def shares(weights, rounds=600, late=None):
    """Rounds of 100 tokens each; `late` joins after a third of them."""
    served, won = {name: 0.0 for name in weights if name != late}, dict.fromkeys(weights, 0)
    for turn in range(rounds):
        if turn == rounds // 3 and late:
            served[late] = joins_at(0.0, served.values())
        chosen, _ = choose_job(0.0, [JobView(name, served=s) for name, s in served.items()])
        served[chosen.id] += 100 / weights[chosen.id]
        won[chosen.id] += 1
    return won


def test_jobs_share_rounds_by_weight():
    assert shares({"a": 1.0, "b": 2.0, "": 3.0}) == {"a": 100, "b": 200, "": 300}


def test_a_job_that_comes_late_gets_its_share_and_no_more():
    won = shares({"a": 1.0, "b": 1.0}, late="b")
    assert won == {"a": 400, "b": 200}


def test_a_higher_priority_goes_first_and_one_that_cannot_train_never():
    low, high = JobView("low", served=0.0), JobView("high", priority=1, served=9.0)
    assert choose_job(0.0, [low, high])[0] is high
    waiting = JobView("high", priority=1, waits="it is paused")
    assert choose_job(0.0, [low, waiting])[0] is low
    assert choose_job(0.0, [waiting]) == (None, "job high: it is paused")


def test_a_job_that_rests_after_discarded_rounds_leaves_the_round_to_others():
    resting, other = JobView("a", rests_until_s=5.0), JobView("", served=99.0)
    assert choose_job(4.0, [resting, other])[0] is other
    assert choose_job(4.0, [resting]) == (None, "job a: pauses for 1.0 s after discarded rounds")
    assert choose_job(5.0, [resting, other])[0] is resting


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"counted": 19}, None),
        ({"counted": 20}, JobStatus.SUCCEEDED),
        ({"completed": 3}, JobStatus.SUCCEEDED),
        ({"discarded_in_a_row": GIVE_UP - 1}, None),
        ({"discarded_in_a_row": GIVE_UP}, JobStatus.FAILED),
        ({"discarded_in_a_row": GIVE_UP, "version": 4}, JobStatus.SUCCEEDED),
    ],
)
def test_a_job_is_done_when_its_epochs_or_rounds_are_or_nothing_gets_better(fields, status):
    job = Job(id="a", created_s=0.0, samples=10, hyperparameters=Hyperparameters(n_epochs=2, max_rounds=3), **fields)
    assert job_done(job)[0] is status


def test_some_prompts_are_held_out_never_all_and_all_samples_of_one_together():
    samples = [TrainSample(id=i, ids=(i // 2, 5, i), target_start=1) for i in range(40)]
    digests = [prompt_digest(s, seed=1) for s in samples]
    out = held_out(digests, 0.1)
    assert len(out) == 2 and sum(d in out for d in digests) == 4
    assert held_out(digests[:2], 0.1) == {digests[0]} and len(held_out(digests[1:3], 0.9)) == 1
    assert out != held_out([prompt_digest(s, seed=2) for s in samples], 0.1)
