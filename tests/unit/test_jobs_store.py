"""The store of files, jobs, events, rounds and feedback: each is kept exactly once (promise 10)."""

import errno
import sqlite3

import msgspec
import pytest

from clif.errors import InputError
from clif.jobs.model import (
    JOB_TRANSITIONS,
    STANDING,
    Conflict,
    FeedbackRow,
    Job,
    JobEvent,
    JobFile,
    JobRound,
    JobStatus,
    LimitReached,
    UnknownId,
    advance_job,
)
from clif.jobs.samples import pieces, write_samples
from clif.jobs.schema import STORE_FILE
from clif.jobs.store import JobStore
from clif.types import TrainSample


def file(name="file-a"):
    return JobFile(id=name, filename="a.jsonl", bytes=9, rows=2, tokens=10, longest=6, created_s=1.0)


def job(name, **fields):
    return Job(id=name, created_s=1.0, **fields)


def feedback(text, owner="ann", at_s=1.0):
    sample = TrainSample(id=0, ids=(1, 2, 3), target_start=1)
    return FeedbackRow(digest=text, created_s=at_s, sample=sample, owner=owner)


def test_what_was_committed_is_there_after_a_kill_and_the_rest_is_not(tmp_path):
    store = JobStore(tmp_path)
    store.register_file(file())
    store.create_job(job("ftjob-a", training_file="file-a"))
    assert store.commit() and not store.commit()
    store.create_job(job("ftjob-b"))
    store.put_job(msgspec.structs.replace(store.get_job("ftjob-a"), counted=7))
    assert store.get_job("ftjob-a").counted == 7
    # The process dies here: nothing ends the transaction.
    del store
    again = JobStore(tmp_path)
    assert again.get_job("ftjob-a").counted == 0 and again.get_file("file-a") == file()
    with pytest.raises(UnknownId, match="no job ftjob-b"):
        again.get_job("ftjob-b")


def test_the_file_is_private_and_never_in_wal_mode(tmp_path):
    store = JobStore(tmp_path)
    store.register_file(file())
    store.close()
    assert (tmp_path / STORE_FILE).stat().st_mode & 0o777 == 0o600
    assert sqlite3.connect(tmp_path / STORE_FILE).execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_round_counts_once():
    store = JobStore(None)
    done = JobRound(round_id=3, job="j", ended_s=1.0, committed=True, samples=8)
    assert store.record_round(done) and not store.record_round(done)
    assert store.known_rounds() == {3}


def test_lists_begin_with_the_newest_and_go_on_where_they_ended():
    store = JobStore(None)
    store.create_job(job(STANDING))
    for name in "abc":
        store.create_job(job(name))
        store.add_event(name, JobEvent(id=f"ftevent-{name}", created_s=1.0, message=name))
    assert [j.id for j in store.list_jobs(limit=2)] == ["c", "b"]
    assert [j.id for j in store.list_jobs(after="b")] == ["a"]
    assert [e.message for e in store.events("b")] == ["b"]
    with pytest.raises(UnknownId, match="no job z to begin after"):
        store.list_jobs(after="z")


def test_a_file_that_a_job_needs_stays_until_the_job_has_ended():
    store = JobStore(None)
    store.register_file(file())
    store.create_job(job("a", training_file="file-a"))
    with pytest.raises(Conflict, match="job a needs the file file-a"):
        store.delete_file("file-a")
    store.put_job(msgspec.structs.replace(store.get_job("a"), status=JobStatus.CANCELLED))
    store.delete_file("file-a")
    assert store.files() == frozenset() and store.live == ()


def test_a_job_needs_files_that_are_there_and_an_id_of_its_own():
    store = JobStore(None)
    with pytest.raises(UnknownId, match="no file file-z"):
        store.create_job(job("a", training_file="file-z"))
    store.create_job(job("a"))
    with pytest.raises(Conflict, match="id a is taken"):
        store.create_job(job("a"))


def test_feedback_counts_once_is_bounded_and_is_forgotten_after_its_job():
    store = JobStore(None)
    assert store.add_feedback(feedback("x"), most=2) and not store.add_feedback(feedback("x"), most=2)
    assert store.add_feedback(feedback("y", "bob", at_s=5.0), most=2)
    with pytest.raises(LimitReached, match="2 rows of feedback wait"):
        store.add_feedback(feedback("z"), most=2)
    assert store.feedback_waiting() == 2 and store.oldest_feedback_s() == 1.0
    assert store.feedback_of("bob", since_s=2.0) == 1 and store.feedback_of("ann", since_s=2.0) == 0
    assert store.take_feedback("job") == 2 and store.feedback_waiting() == 0 and store.oldest_feedback_s() is None
    assert len(store.feedback_samples("job")) == 2
    store.drop_feedback("job")
    assert store.feedback_samples("job") == ()
    assert not store.add_feedback(feedback("x"), most=2)


def test_a_damaged_file_is_a_sentence_that_says_what_to_do(tmp_path):
    (tmp_path / STORE_FILE).write_bytes(b"SQLite format 3\x00" + b"no page" * 500)
    with pytest.raises(InputError, match="Restore it from a backup, or move it away"):
        JobStore(tmp_path)


def test_tables_of_a_newer_clif_are_refused(tmp_path):
    JobStore(tmp_path).close()
    sqlite3.connect(tmp_path / STORE_FILE).execute("PRAGMA user_version = 99").connection.commit()
    with pytest.raises(InputError, match="written by a newer CLIF"):
        JobStore(tmp_path)


def test_a_job_never_leaves_its_end():
    assert advance_job(JobStatus.QUEUED, JobStatus.RUNNING) is JobStatus.RUNNING
    for end in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED):
        assert not JOB_TRANSITIONS[end]
        with pytest.raises(Conflict, match=f"the job is {end.value}"):
            advance_job(end, JobStatus.QUEUED)


def test_samples_are_read_as_they_were_written_in_pieces(tmp_path):
    samples = [TrainSample(id=i, ids=(1, 2, i), target_start=1) for i in range(1201)]
    write_samples(tmp_path / "f.samples", samples)
    found = list(pieces(tmp_path / "f.samples"))
    assert [len(piece) for piece in found] == [500, 500, 201]
    assert [sample for piece in found for sample in piece] == samples


def test_a_damaged_file_of_samples_is_a_sentence(tmp_path):
    write_samples(tmp_path / "f.samples", [TrainSample(id=0, ids=(1, 2), target_start=1)])
    (tmp_path / "f.samples").write_bytes((tmp_path / "f.samples").read_bytes()[:-1])
    for name in ("f.samples", "none"):
        with pytest.raises(InputError, match=r"cannot be read .* upload the file again"):
            list(pieces(tmp_path / name))


def test_a_full_disk_is_an_error_of_the_system_and_what_was_committed_stays(tmp_path):
    store = JobStore(tmp_path)
    store.create_job(job("a"))
    store.commit()
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match="disk is full") as error:
        store.create_job(job("b", metadata={"text": "x" * 10_000}))
    assert error.value.errno == errno.ENOSPC
    del store
    assert [j.id for j in JobStore(tmp_path).live] == ["a"]
