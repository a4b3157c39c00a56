"""Files, jobs, events, rounds and feedback of a run, in RUN/jobs.db. Owned by the control process alone. Free of torch.

What is written becomes durable by commit(), all of it or nothing: the control process calls it once per step of its
loop, before it sends any reply. Reads see what was written before.
"""

from __future__ import annotations

import errno
import secrets
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from clif.jobs.model import (
    STANDING,
    Conflict,
    FeedbackRow,
    Job,
    JobEvent,
    JobFile,
    JobRound,
    LimitReached,
    UnknownId,
)
from clif.jobs.schema import STORE_FILE, open_store
from clif.types import TrainSample

T = TypeVar("T", JobFile, Job, JobEvent, JobRound)
encode = msgspec.msgpack.Encoder().encode
PAGE = 20
"""Records of a list, where no limit is given."""


class StoreFailed(OSError):
    """A write to RUN/jobs.db failed: what was written since the last commit is lost, and the process must end."""


def new_id(kind: str) -> str:
    """An id that nothing has yet, as "file-1f2e..."."""
    return f"{kind}-{secrets.token_hex(12)}"


class JobStore:
    """The one writer of RUN/jobs.db. Raises InputError for a damaged file, StoreFailed when a write fails.

    All jobs that have not ended, and the standing one, are held in memory too: policies read them a few times a second.
    """

    def __init__(self, run_dir: Path | None) -> None:
        """run_dir: None keeps all of it in memory."""
        self.run_dir = run_dir
        self._db = open_store(None if run_dir is None else run_dir / STORE_FILE)
        rows = self._db.execute("SELECT body FROM jobs ORDER BY number")
        jobs = (msgspec.msgpack.decode(body, type=Job) for (body,) in rows)
        self._live = {job.id: job for job in jobs if not job.ended}

    @staticmethod
    def exists(run_dir: Path) -> bool:
        """Whether a run has had jobs."""
        return (run_dir / STORE_FILE).exists()

    def commit(self) -> bool:
        """Make durable what was written since the last call. Returns whether there was anything."""
        if not self._db.in_transaction:
            return False
        self._execute("COMMIT")
        return True

    def close(self) -> None:
        self.commit()
        self._db.close()

    # --- files -----------------------------------------------------------------------------------

    def register_file(self, file: JobFile) -> None:
        """Raises Conflict for an id that is taken."""
        self._insert("files", file)

    def get_file(self, id: str) -> JobFile:
        """Raises UnknownId."""
        return self._get("files", id, JobFile)

    def list_files(self, after: str | None = None, limit: int = PAGE) -> tuple[JobFile, ...]:
        """The newest first, from the one behind `after` on. Raises UnknownId for an `after` that is no file."""
        return self._list("files", after, limit, JobFile)

    def files(self) -> frozenset[str]:
        """Ids of all files; what lies in RUN/files and is none of them is an orphan."""
        return frozenset(id for (id,) in self._db.execute("SELECT id FROM files"))

    def delete_file(self, id: str) -> None:
        """Forget a file; the caller removes what lies in RUN/files. Raises UnknownId; Conflict if a job needs it."""
        self.get_file(id)
        needs = [job.id for job in self._live.values() if id in (job.training_file, job.validation_file)]
        if needs:
            raise Conflict(f"the job {needs[0]} needs the file {id}: cancel it first, or wait until it has ended")
        self._write("DELETE FROM files WHERE id = ?", (id,))

    # --- jobs ------------------------------------------------------------------------------------

    def create_job(self, job: Job) -> None:
        """Raises Conflict for an id that is taken, UnknownId for a file that is not there."""
        for file in filter(None, (job.training_file, job.validation_file)):
            self.get_file(file)
        self._insert("jobs", job)
        self._live[job.id] = job

    def get_job(self, id: str) -> Job:
        """Raises UnknownId."""
        return self._live.get(id) or self._get("jobs", id, Job)

    def list_jobs(self, after: str | None = None, limit: int = PAGE) -> tuple[Job, ...]:
        """As list_files(); without the standing job."""
        return self._list("jobs", after, limit, Job)

    def jobs(self) -> frozenset[str]:
        """Ids of all jobs, the standing one included."""
        return frozenset(id for (id,) in self._db.execute("SELECT id FROM jobs"))

    @property
    def live(self) -> tuple[Job, ...]:
        """Jobs that have not ended, and the standing one, in the order of their creation."""
        return tuple(self._live.values())

    def put_job(self, job: Job) -> Job:
        """Replace a job's record; returns it."""
        self._write("UPDATE jobs SET body = ? WHERE id = ?", (encode(job), job.id))
        self._live[job.id] = job
        if job.ended:
            del self._live[job.id]
        return job

    def add_event(self, job: str, event: JobEvent) -> None:
        self._write("INSERT INTO events (job, id, body) VALUES (?, ?, ?)", (job, event.id, encode(event)))

    def events(self, job: str, after: str | None = None, limit: int = PAGE) -> tuple[JobEvent, ...]:
        """The newest first, from the one behind `after` on. Raises UnknownId for a job or an `after` that is none."""
        self.get_job(job)
        return self._list("events", after, limit, JobEvent, job)

    # --- rounds ----------------------------------------------------------------------------------

    def record_round(self, done: JobRound) -> bool:
        """Note what a round did. False, and nothing is changed, if it is known: a round counts once."""
        values = (done.round_id, done.job, encode(done))
        return self._write("INSERT OR IGNORE INTO rounds (round_id, job, body) VALUES (?, ?, ?)", values) == 1

    def known_rounds(self) -> frozenset[int]:
        return frozenset(number for (number,) in self._db.execute("SELECT round_id FROM rounds"))

    def rounds(self, job: str, committed: bool = False) -> tuple[JobRound, ...]:
        """The rounds of a job in order. committed: of these alone, which are its checkpoints."""
        rows = self._db.execute("SELECT body FROM rounds WHERE job = ? ORDER BY round_id", (job,))
        found = [msgspec.msgpack.decode(body, type=JobRound) for (body,) in rows]
        return tuple(done for done in found if done.committed or not committed)

    def checkpoints(self, job: str) -> tuple[JobRound, ...]:
        """Its committed rounds in order; each has made a version. Raises UnknownId."""
        self.get_job(job)
        return self.rounds(job, committed=True)

    # --- feedback --------------------------------------------------------------------------------

    def add_feedback(self, row: FeedbackRow, most: int) -> bool:
        """Keep a row until a batch takes it. False: its content is known already.

        Raises LimitReached when as many as `most` rows wait.
        """
        if self._db.execute("SELECT 1 FROM feedback WHERE digest = ?", (row.digest,)).fetchone():
            return False
        if self.feedback_waiting() >= most:
            raise LimitReached(f"{most} rows of feedback wait for training: try again later (jobs.max_feedback)")
        values = (row.digest, row.owner, row.created_s, row.source, encode(row.sample))
        columns = "digest, owner, created_s, source, sample"
        self._write(f"INSERT INTO feedback ({columns}) VALUES (?, ?, ?, ?, ?)", values)
        return True

    def feedback_waiting(self) -> int:
        """Rows that no job has taken yet."""
        return self._one("SELECT count(*) FROM feedback WHERE job = ''")

    def oldest_feedback_s(self) -> float | None:
        """When the first row came that no job has taken yet."""
        return self._one("SELECT min(created_s) FROM feedback WHERE job = ''")

    def feedback_of(self, owner: str, since_s: float) -> int:
        """Rows that this key has given since then, for its quota."""
        return self._one("SELECT count(*) FROM feedback WHERE owner = ? AND created_s >= ?", owner, since_s)

    def take_feedback(self, job: str) -> int:
        """Give all rows that wait to a job; returns their number."""
        return self._write("UPDATE feedback SET job = ? WHERE job = ''", (job,))

    def feedback_samples(self, job: str) -> tuple[TrainSample, ...]:
        """The rows of a job, in the order in which they came; none once drop_feedback() was called."""
        rows = self._db.execute("SELECT sample FROM feedback WHERE job = ? AND sample NOT NULL ORDER BY number", (job,))
        return tuple(msgspec.msgpack.decode(sample, type=TrainSample) for (sample,) in rows)

    def drop_feedback(self, job: str) -> None:
        """Forget what the rows of a job say, and keep that they were given."""
        self._write("UPDATE feedback SET sample = NULL WHERE job = ?", (job,))

    # --- all of them -----------------------------------------------------------------------------

    def _write(self, statement: str, values: Sequence[object]) -> int:
        """Within the transaction of this step. Returns how many rows have changed."""
        if not self._db.in_transaction:
            self._execute("BEGIN IMMEDIATE")
        return self._execute(statement, values).rowcount

    def _execute(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """A statement that writes. Where the disk refuses it the process ends, and the next one has the last commit."""
        try:
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise StoreFailed(number, str(error), str(self.run_dir and self.run_dir / STORE_FILE)) from error

    def _one(self, query: str, *values: object) -> int:
        return self._db.execute(query, values).fetchone()[0]

    def _insert(self, table: str, record: JobFile | Job) -> None:
        try:
            self._write(f"INSERT INTO {table} (id, body) VALUES (?, ?)", (record.id, encode(record)))
        except sqlite3.IntegrityError as error:
            raise Conflict(f"the id {record.id} is taken") from error

    def _get(self, table: str, id: str, kind: type[T]) -> T:
        row = self._db.execute(f"SELECT body FROM {table} WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise UnknownId(f"there is no {table[:-1]} {id}")
        return msgspec.msgpack.decode(row[0], type=kind)

    def _list(self, table: str, after: str | None, limit: int, kind: type[T], job: str | None = None) -> tuple[T, ...]:
        before = 2**62
        if after is not None:
            row = self._db.execute(f"SELECT number FROM {table} WHERE id = ?", (after,)).fetchone()
            if row is None:
                raise UnknownId(f"there is no {table[:-1]} {after} to begin after")
            before = row[0]
        of_job = " AND job = ?" if job is not None else ""
        query = f"SELECT body FROM {table} WHERE number < ? AND id != ?{of_job} ORDER BY number DESC LIMIT ?"
        values = (before, STANDING, *([job] if job is not None else []), limit)
        return tuple(msgspec.msgpack.decode(body, type=kind) for (body,) in self._db.execute(query, values))
