"""Training jobs through the control server, with scripted replicas in virtual time: promise 10, also across a kill."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import scripted_replica
from control_run import Run, make_config

from clif.control.__main__ import open_jobs
from clif.errors import InputError
from clif.jobs.model import (
    STANDING,
    Conflict,
    FeedbackRow,
    Hyperparameters,
    Job,
    JobFile,
    JobRound,
    JobStatus,
    LimitReached,
    UnknownId,
)
from clif.jobs.samples import samples_path, write_samples
from clif.jobs.store import JobStore
from clif.types import TrainSample
from clif.wire import messages as wire
from clif.wire.frontend import Refused

ROUND_SAMPLES = 16
"""Samples of a round of two scripted replicas."""


def settings(tmp_path: Path, linger_s: float = 6.0, **sections: Any) -> Any:
    """No load, and rounds for as long as a run lingers."""
    given: dict[str, Any] = {
        "load": {"kind": "none"}, "quality": {"exact_match_rows": 0}, "run": {"linger_s": linger_s},
        "federation": {"rounds": None, "min_members": 2, "local_steps": 2},
    }  # fmt: skip
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    return make_config(tmp_path, **given)


def sample(number: int, length: int = 6) -> TrainSample:
    return TrainSample(id=number, ids=(number + 10, *range(1, length)), target_start=3)


def add_file(run: Run, name: str = "file-a", samples: int = 80, length: int = 6) -> None:
    path = samples_path(run.config.run_dir, name)
    path.parent.mkdir(exist_ok=True)
    write_samples(path, [sample(i, length) for i in range(samples)])
    file = JobFile(id=name, filename="a", bytes=1, rows=samples, tokens=1, longest=length, created_s=0.0)
    run.jobs.register_file(file)


def add_job(run: Run, name: str, file: str = "file-a", epochs: int = 100, at_s: float = 0.0, **fields: Any) -> None:
    """A job that is created so long after the start."""
    wanted = Hyperparameters(n_epochs=epochs, **fields.pop("wanted", {}))
    job = Job(id=name, created_s=at_s, training_file=file, hyperparameters=wanted, **fields)
    run.time.after(at_s, lambda: run.server.jobs.create(run.time(), job))


def of_jobs(run: Run) -> Counter[str]:
    return Counter(plan.job for plan in run.leaders[0].plans)


def status(run: Run, job: str) -> JobStatus:
    return run.jobs.get_job(job).status


def messages(run: Run, job: str) -> list[str]:
    return [event.message for event in reversed(run.jobs.events(job, limit=1000))]


def test_jobs_and_the_runs_own_data_share_the_rounds_by_weight(tmp_path: Path) -> None:
    run = Run(settings(tmp_path), jobs=True)
    add_file(run)
    add_job(run, "single")
    add_job(run, "double", weight=2.0)
    run.go()
    rounds = of_jobs(run)
    assert rounds[STANDING] > 5
    assert abs(rounds["single"] - rounds[STANDING]) <= 1 and abs(rounds["double"] - 2 * rounds["single"]) <= 2


def test_a_job_trains_its_epochs_each_round_counts_once_and_then_it_succeeds(tmp_path: Path) -> None:
    run = Run(settings(tmp_path), jobs=True)
    add_file(run, samples=80)
    add_job(run, "job", epochs=2)
    run.go()
    job = run.jobs.get_job("job")
    # 8 of the 80 prompts are held out.
    assert (job.samples, job.wanted, job.status) == (72, 144, JobStatus.SUCCEEDED)
    assert job.counted == ROUND_SAMPLES * job.completed >= job.wanted > job.counted - ROUND_SAMPLES
    assert job.version == run.jobs.checkpoints("job")[-1].version > 0
    assert of_jobs(run)["job"] == job.completed == len(run.jobs.checkpoints("job"))
    said = messages(run, "job")
    assert said[0] == "the job is created; its files are being read"
    assert said[1] == "72 samples to train on; the job waits for slack"
    assert said[2] == "the job trains" and said[-1] == "144 samples were trained on, 2 epochs"


def test_each_replica_gets_its_part_of_the_samples_and_all_of_them_are_given_out(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, linger_s=3.0), jobs=True)
    got: dict[int, list[wire.JobData]] = {0: [], 1: []}
    for leader in run.leaders:
        obey = leader.obey

        def note(message: wire.Down, obey: Any = obey, mine: list[Any] = got[leader.replica]) -> None:
            mine.append(message) if isinstance(message, wire.JobData) else obey(message)

        leader.obey = note
    add_file(run, samples=1200)
    add_job(run, "job")
    run.go()
    train = {r: [s.id for m in pieces for s in m.train] for r, pieces in got.items()}
    gate = {r: [s.id for m in pieces for s in m.gate] for r, pieces in got.items()}
    assert sorted(i for ids in (*train.values(), *gate.values()) for i in ids) == list(range(1200))
    assert abs(len(train[0]) - len(train[1])) <= 1 and len(gate[0]) == len(gate[1]) == 60
    assert all([m.complete for m in pieces] == [False] * 3 + [True] for pieces in got.values())
    assert all(pieces[-1].own_gate for pieces in got.values()), "adapter clif answers all users"


def test_few_held_out_rows_are_shared_and_replicas_without_samples_take_no_part(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, linger_s=3.0), leaders=3, jobs=True)
    add_file(run, samples=3)
    add_job(run, "job", epochs=3)
    run.go()
    (members,) = {plan.members for plan in run.leaders[0].plans if plan.job}
    assert members == (0, 1) and status(run, "job") is JobStatus.SUCCEEDED


def test_a_paused_job_takes_no_round_until_it_goes_on_and_claims_nothing_for_the_pause(tmp_path: Path) -> None:
    run = Run(settings(tmp_path), jobs=True)
    add_file(run)
    add_job(run, "job")
    seen: list[int] = []
    run.time.after(1.0, lambda: run.server.jobs.pause(run.time(), "job"))
    run.time.after(1.5, lambda: seen.append(of_jobs(run)["job"]))
    run.time.after(4.0, lambda: seen.append(of_jobs(run)["job"]))
    run.time.after(4.0, lambda: run.server.jobs.resume(run.time(), "job"))
    run.go()
    (before, after), rounds = seen, of_jobs(run)
    assert before == after > 0
    later = rounds["job"] - after
    assert 0 < later < rounds[STANDING] / 2


def test_a_cancelled_job_loses_its_round_and_never_trains_again(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, linger_s=4.0), jobs=True)
    for leader in run.leaders:
        leader.trains_until_told = True
    add_file(run)
    add_job(run, "job", priority=1)
    run.time.after(2.0, lambda: run.server.jobs.cancel(run.time(), "job"))
    run.go()
    assert status(run, "job") is JobStatus.CANCELLED and of_jobs(run)["job"] == 1
    (row,) = [row for row in run.table("rounds") if row["reason"] == "its job has ended"]
    assert row["state"] == "discarded" and not run.jobs.get_job("job").counted
    with pytest.raises(Conflict, match="the job is cancelled: it cannot become paused"):
        run.server.jobs.pause(0.0, "job")


def test_replicas_that_judge_a_job_as_it_is_cancelled_are_not_taken_for_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(settings(tmp_path, linger_s=2.0), jobs=True)
    add_file(run, samples=8000)
    add_job(run, "job", priority=1)
    for leader in run.leaders:

        def obey(message: wire.Down, leader: Any = leader, obey: Any = leader.obey) -> None:
            if isinstance(message, wire.Aggregate):
                # The job has more held-out rows than the run, and a client cancels it before the votes are there.
                monkeypatch.setattr(scripted_replica, "HELDOUT_TOKENS", 2000 if leader.plan.job else 10)
                if leader.plan.job and not run.jobs.get_job("job").ended:
                    run.server.jobs.cancel(run.time(), "job")
            obey(message)

        leader.obey = obey
    run.go()
    assert run.server._ports.quality.most_tokens < 2000 and status(run, "job") is JobStatus.CANCELLED
    assert of_jobs(run)["job"] == 1 and not [row for row in run.table("transitions") if row["to_state"] == "failed"]


def test_a_job_whose_candidates_are_never_better_fails_and_the_others_go_on(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, linger_s=8.0), jobs=True)
    plans = run.leaders[0].plans
    for leader in run.leaders:
        aggregate = leader.obey

        def judge(message: wire.Down, leader: Any = leader, obey: Any = aggregate) -> None:
            leader.candidate_loss = 30.0 if plans and plans[-1].job else 1.0
            obey(message)

        leader.obey = judge
    add_file(run)
    add_job(run, "job")
    run.go()
    job = run.jobs.get_job("job")
    assert job.status is JobStatus.FAILED and job.error == (
        "8 rounds in a row were discarded, the last because: held-out loss 3.0000 is worse than 2.0000"
    )
    assert job.lr_scale == 1 / 64 and not job.counted and job.trained_tokens == 160 * 8
    assert [plan.lr_scale for plan in plans if plan.job][:3] == [1.0, 0.5, 0.25]
    assert {plan.lr_scale for plan in plans if not plan.job} == {1.0}, "the run's own data have a history of their own"


@pytest.mark.parametrize(
    ("samples", "length", "why"),
    [(0, 6, "it has no sample to train on"), (5, 600, "a sample of 600 tokens: this run trains on 512 at most")],
)
def test_a_job_that_cannot_run_fails_with_the_reason(tmp_path: Path, samples: int, length: int, why: str) -> None:
    run = Run(settings(tmp_path, linger_s=2.0), jobs=True)
    add_file(run, samples=samples, length=length)
    add_job(run, "job")
    run.go()
    job = run.jobs.get_job("job")
    assert job.status is JobStatus.FAILED and job.error.startswith(why)


def test_jobs_are_bounded_and_their_files_must_be_there(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, jobs={"max_jobs": 1}), jobs=True)
    add_file(run)
    board = run.server.jobs
    board.create(0.0, Job(id="a", created_s=0.0, training_file="file-a"))
    with pytest.raises(LimitReached, match=r"as jobs\.max_jobs allows"):
        board.create(0.0, Job(id="b", created_s=0.0, training_file="file-a"))
    board.cancel(0.0, "a")
    with pytest.raises(UnknownId, match="no file file-z"):
        board.create(0.0, Job(id="b", created_s=0.0, training_file="file-z"))


def test_what_a_job_chooses_reaches_its_rounds(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, linger_s=3.0), jobs=True)
    add_file(run)
    wanted = {"batch_size": 6, "learning_rate_multiplier": 0.5, "max_rounds": 2}
    add_job(run, "job", wanted=wanted)
    run.go()
    plans = [plan for plan in run.leaders[0].plans if plan.job]
    assert [(p.micro_batch, p.accumulation, p.lr_scale) for p in plans] == [(4, 2, 0.5)] * 2
    assert messages(run, "job")[-1] == "2 rounds are committed, as many as were asked for"


def row(number: int, at_s: float) -> FeedbackRow:
    return FeedbackRow(digest=str(number), created_s=at_s, sample=sample(number), owner="ann")


FEEDBACK = {"allow_feedback": True, "feedback_rows": 8, "feedback_wait_s": 1.0, "feedback_epochs": 1}


def test_enough_feedback_becomes_a_job_at_once_and_less_of_it_after_a_wait(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, jobs=FEEDBACK), jobs=True)

    def give(numbers: range) -> None:
        now = run.time()
        assert run.server.jobs.add_feedback(now, [row(i, now) for i in numbers]) == (len(numbers), 0)

    run.time.after(1.0, lambda: give(range(8)))
    run.time.after(3.0, lambda: give(range(8, 11)))
    run.time.after(3.1, lambda: run.server.jobs.add_feedback(run.time(), [row(0, run.time())]))
    run.go()
    second, first = run.jobs.list_jobs()
    assert first.created_s - 1001.0 < 0.5 and 1.0 <= second.created_s - 1003.0 < 1.5
    assert (first.samples, second.samples) == (7, 2), "one prompt of each is held out"
    assert {first.status, second.status} == {JobStatus.SUCCEEDED} and first.adapter == "clif"
    assert run.jobs.feedback_samples(first.id) == () and run.jobs.feedback_waiting() == 0


def test_a_key_has_a_quota_of_feedback(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, jobs={**FEEDBACK, "feedback_quota": 2}), jobs=True)
    with pytest.raises(LimitReached, match="2 rows of feedback in a day"):
        run.server.jobs.add_feedback(0.0, [row(i, 0.0) for i in range(3)])
    assert run.jobs.feedback_waiting() == 2


def test_a_rebuilt_replica_gets_the_samples_again_before_it_trains(tmp_path: Path) -> None:
    run = Run(settings(tmp_path), jobs=True)
    got: list[int] = []
    leader = run.leaders[1]
    obey = leader.obey

    def note(message: wire.Down) -> None:
        if isinstance(message, wire.JobData) and message.complete:
            got.append(leader.incarnation)
        if isinstance(message, wire.BeginRound) and message.plan.job:
            assert leader.incarnation in got
        obey(message)

    leader.obey = note
    add_file(run)
    add_job(run, "job")
    run.time.after(1.0, lambda: leader.rebuild("RuntimeError: out of memory"))
    run.go()
    assert got == [0, 1] and {plan.incarnations for plan in run.leaders[0].plans} >= {(0, 0), (0, 1)}


def test_a_job_with_a_suffix_trains_an_adapter_of_that_name_and_clif_goes_its_own_way(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, adapter={"serving_slots": 6}), jobs=True)
    add_file(run)
    add_job(run, "job", suffix="support", epochs=2)
    run.go()
    stored = {v.number: v for v in run.server.versions.store.committed()}
    support = [v for v in stored.values() if v.adapter == "support"]
    assert [v.parent for v in support] == [0, *(v.number for v in support[:-1])], "each from the one before"
    assert {v.job for v in support} == {"job"} and status(run, "job") is JobStatus.SUCCEEDED
    assert run.jobs.get_job("job").version == support[-1].number == run.server.versions.active("support")
    assert stored[run.server.versions.active()].adapter == "clif"
    bases = [plan.base_version for plan in run.leaders[0].plans if not plan.job]
    assert all(not base or stored[base].adapter == "clif" for base in bases)


def test_a_suffix_that_is_no_name_or_has_no_slot_is_refused(tmp_path: Path) -> None:
    run = Run(settings(tmp_path, adapter={"serving_slots": 3}), jobs=True)
    add_file(run)
    for suffix, why in (("No!", "cannot name an adapter"), ("clif", "leave the suffix out"), ("base", "not 'base'")):
        with pytest.raises((InputError, Refused), match=why):
            run.server.jobs.create(0.0, Job(id=suffix, created_s=0.0, training_file="file-a", suffix=suffix))
    run.server.jobs.create(0.0, Job(id="a", created_s=0.0, training_file="file-a", suffix="one"))
    run.server.jobs.create(0.0, Job(id="b", created_s=0.0, training_file="file-a", suffix="one"))
    run.server.jobs.create(0.0, Job(id="c", created_s=0.0, training_file="file-a", suffix="two"))
    with pytest.raises(Refused, match=r"raise adapter\.serving_slots"):
        run.server.jobs.create(0.0, Job(id="d", created_s=0.0, training_file="file-a", suffix="three"))


class Killed(BaseException):
    """The control process is gone."""


def kill_at_first_record(run: Run, after_write: bool) -> None:
    """When the first round of a job is noted: before that, or before the note is durable."""
    record = run.jobs.record_round

    def die(done: JobRound) -> bool:
        if done.job:
            after_write and record(done)
            run.jobs.commit = lambda: False  # type: ignore[method-assign]
            raise Killed
        return record(done)

    run.jobs.record_round = die  # type: ignore[method-assign]


@pytest.mark.parametrize("after_write", [False, True])
def test_a_kill_between_the_commit_of_a_round_and_its_note_counts_its_samples_once(
    tmp_path: Path, after_write: bool
) -> None:
    config = settings(tmp_path, run={"resume": True})
    first = Run(config, files=True, jobs=True)
    add_file(first)
    add_job(first, "job", epochs=1)
    kill_at_first_record(first, after_write)
    with pytest.raises(Killed):
        first.go()
    first.jobs._db.close()
    second = Run(config, files=True, jobs=True, after=first)
    assert second.jobs.get_job("job").counted == ROUND_SAMPLES, "the journal says what the round did"
    second.go()
    job, rounds = second.jobs.get_job("job"), second.jobs.checkpoints("job")
    assert job.status is JobStatus.SUCCEEDED and job.counted == ROUND_SAMPLES * len(rounds) == 80
    assert [r.round_id for r in rounds] == [v.round_id for v in second.server.versions.store.committed() if v.job]
    assert "before the control process ended" in rounds[0].reason and "before" not in rounds[1].reason
    third = JobStore(config.run_dir)
    assert third.get_job("job") == job, "all of it is durable"


def test_a_run_that_does_not_train_leaves_the_files_of_jobs_where_they_are(tmp_path: Path) -> None:
    run = Run(settings(tmp_path), files=True, jobs=True)
    add_file(run)
    run.jobs.close()
    orphan = samples_path(run.config.run_dir, "file-z")
    orphan.touch()
    for trains in (False, True):
        config = settings(tmp_path, train={"enabled": trains})
        open_jobs(config, run.config.run_dir).close()
        assert samples_path(run.config.run_dir, "file-a").exists() and orphan.exists() is not trains
