"""What clients ask about files, jobs and feedback: their actions, carried out on the job board. Free of torch.

A user's key is shown what it has created, and nothing else exists for it; an admin sees everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

from msgspec.structs import replace

from clif.control.frontend import Handlers
from clif.control.job_shares import JobShares
from clif.control.jobs import JobBoard
from clif.errors import InputError
from clif.jobs.model import (
    Conflict,
    FeedbackRow,
    Hyperparameters,
    Job,
    JobEvent,
    JobFile,
    LimitReached,
    UnknownId,
)
from clif.jobs.store import new_id
from clif.types import CLIF
from clif.wire.frontend import (
    ChangeJob,
    CreateJob,
    DeleteFile,
    GetFile,
    GetJob,
    GiveFeedback,
    Kind,
    ListCheckpoints,
    ListFiles,
    ListJobEvents,
    ListJobs,
    Refused,
    RegisterFile,
)

KINDS: tuple[tuple[type[InputError], Kind], ...] = (
    (UnknownId, "not_found"),
    (Conflict, "conflict"),
    (LimitReached, "too_many"),
    (InputError, "invalid"),
)
PAGE = 100
"""Records that are read at once when a user's own are sought."""
BASE = "base"


R = TypeVar("R", JobFile, Job)


class JobActions:
    """unix: a stamp of the server's clock as wall time."""

    def __init__(
        self, board: JobBoard, unix: Callable[[float], float], active: Callable[[str], int], shares: JobShares
    ) -> None:
        """active: the active version of an adapter, 0 for none."""
        self._board, self._store, self._unix, self._active = board, board.store, unix, active
        self._shares = shares

    def handlers(self) -> Handlers:
        found: dict[type, Callable[[float, Any], Any]] = {
            RegisterFile: self.register_file,
            GetFile: lambda _, action: self._file(action.id, action.sees),
            ListFiles: lambda _, action: page_of(self._store.list_files, action),
            DeleteFile: self.delete_file,
            CreateJob: self.create_job,
            GetJob: lambda _, action: self._job(action.id, action.sees),
            ListJobs: lambda _, action: page_of(self._store.list_jobs, action),
            ChangeJob: self.change_job,
            ListJobEvents: self.list_events,
            ListCheckpoints: self.list_checkpoints,
            GiveFeedback: self.give_feedback,
        }
        return {kind: refusing(handler) for kind, handler in found.items()}

    def register_file(self, now: float, action: RegisterFile) -> JobFile:
        self._shares.check_file(action)
        file = JobFile(
            id=action.id,
            filename=action.filename,
            bytes=action.bytes,
            rows=action.rows,
            tokens=action.tokens,
            longest=action.longest,
            created_s=self._unix(now),
            owner=action.owner,
        )
        self._store.register_file(file)
        return file

    def delete_file(self, now: float, action: DeleteFile) -> str:
        """The front end removes what lies in RUN/files, once this is durable."""
        self._file(action.id, action.sees)
        self._store.delete_file(action.id)
        return action.id

    def create_job(self, now: float, action: CreateJob) -> Job:
        for name in ("training_file", "validation_file"):
            if file := getattr(action, name):
                try:
                    self._file(file, action.sees)
                except UnknownId as error:
                    raise Refused("invalid", str(error), name) from error
        self._shares.check_job(action)
        problem = cannot_begin(action.model, action.suffix, self._active(action.suffix or CLIF))
        if problem:
            raise Refused("invalid", problem, "model")
        self._shares.check_adapter(action)
        wanted = Hyperparameters(
            n_epochs=action.n_epochs,
            batch_size=action.batch_size,
            learning_rate_multiplier=action.learning_rate_multiplier,
            seed=action.seed,
            max_rounds=action.max_rounds,
        )
        job = Job(
            id=new_id("ftjob"),
            created_s=self._unix(now),
            training_file=action.training_file,
            validation_file=action.validation_file,
            suffix=action.suffix,
            hyperparameters=wanted,
            weight=action.weight,
            priority=action.priority,
            owner=action.owner,
            metadata=action.metadata,
        )
        return self._board.create(now, job)

    def change_job(self, now: float, action: ChangeJob) -> Job:
        self._job(action.id, action.sees)
        changes = {"cancel": self._board.cancel, "pause": self._board.pause, "resume": self._board.resume}
        return changes[action.change](now, action.id)

    def list_events(self, now: float, action: ListJobEvents) -> dict[str, Any]:
        self._job(action.id, action.sees)
        found: Sequence[JobEvent] = self._store.events(action.id, action.after, action.limit + 1)
        return cut(found, action.limit)

    def list_checkpoints(self, now: float, action: ListCheckpoints) -> dict[str, Any]:
        """The steps of each are those of the job up to then."""
        self._job(action.id, action.sees)
        committed = self._store.checkpoints(action.id)
        steps = accumulate(done.steps for done in committed)
        found = [replace(done, steps=up_to) for done, up_to in zip(committed, steps, strict=True)][::-1]
        if action.after is not None:
            found = [done for done in found if done.version < action.after]
        return cut(found, action.limit)

    def give_feedback(self, now: float, action: GiveFeedback) -> dict[str, Any]:
        row = FeedbackRow(
            digest=action.digest,
            created_s=self._unix(now),
            sample=action.sample,
            source=action.source,
            owner=action.owner,
        )
        kept, _ = self._board.add_feedback(now, [row])
        return {"kept": bool(kept), "waiting": self._store.feedback_waiting()}

    def _file(self, id: str, sees: str | None) -> JobFile:
        return seen(self._store.get_file(id), sees, "file")

    def _job(self, id: str, sees: str | None) -> Job:
        return seen(self._store.get_job(id), sees, "job")


def cannot_begin(model: str, suffix: str, active: int) -> str:
    """Why a job cannot begin from this model; empty: it can. active: version of the adapter that it would train."""
    if not suffix:
        return "" if model == CLIF else f"without a suffix a job goes on from {CLIF}: name that model, or give a suffix"
    if active and model != suffix:
        return (
            f"the adapter {suffix} is there already: name the model {suffix} to go on from it, or take another suffix"
        )
    if not active and model != BASE:
        return f"a new adapter begins from {BASE}: name that model"
    return ""


def seen(record: R, sees: str | None, what: str) -> R:
    """The record, if this key may see it. Raises UnknownId: whether others have it is not told."""
    # The standing job has no id that a client could name.
    if not record.id or sees not in (None, record.owner):
        raise UnknownId(f"there is no {what} {record.id}")
    return record


def page_of(read: Callable[[str | None, int], Sequence[R]], action: ListFiles | ListJobs) -> dict[str, Any]:
    """A page of records, as cut() makes it, of those that the key may see."""
    if action.sees is None:
        return cut(read(action.after, action.limit + 1), action.limit)
    found: list[R] = []
    after = action.after
    while len(found) <= action.limit and (page := read(after, PAGE)):
        found += [record for record in page if record.owner == action.sees]
        after = page[-1].id
    return cut(found[: action.limit + 1], action.limit)


def cut(found: Sequence[Any], limit: int) -> dict[str, Any]:
    return {"data": found[:limit], "has_more": len(found) > limit}


def refusing(handler: Callable[[float, Any], Any]) -> Callable[[float, Any], Any]:
    """Errors that the client can mend become refusals."""

    def handle(now: float, action: Any) -> Any:
        try:
            return handler(now, action)
        except InputError as error:
            kind = next(kind for error_type, kind in KINDS if isinstance(error, error_type))
            raise Refused(kind, str(error)) from error

    return handle
