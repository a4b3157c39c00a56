"""Files, jobs, events and checkpoints in the shape that OpenAI's clients read. Free of torch."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from clif.jobs.model import Job, JobEvent, JobFile, JobRound, JobStatus
from clif.types import CLIF, pinned_name

BASE = "base"


class Listed(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)
    id: str


L = TypeVar("L", bound=Listed)


class Page(BaseModel, Generic[L]):
    """Part of a list, the newest first. The next part begins after last_id."""

    object: Literal["list"] = "list"
    data: list[L]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, found: list[L], has_more: bool) -> Page[L]:
        ends = (found[0].id, found[-1].id) if found else (None, None)
        return cls(data=found, first_id=ends[0], last_id=ends[1], has_more=has_more)


class FileObject(Listed):
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None
    expires_at: None = None
    rows: int
    """Samples in the file."""
    tokens: int
    """Of all samples."""


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class JobHyperparameters(BaseModel):
    n_epochs: int
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float
    max_rounds: int | None


class Supervised(BaseModel):
    hyperparameters: JobHyperparameters


class Method(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: Supervised


class JobError(BaseModel):
    code: str
    message: str
    param: str | None = None


class JobObject(Listed):
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: None = None
    status: JobStatus
    model: str
    """Where it began."""
    fine_tuned_model: str | None
    """The version that it made, once it has ended."""
    latest_model: str | None
    """The last version that it made up to now."""
    organization_id: str
    """Name of the key that created it."""
    training_file: str
    """Empty: rows of feedback."""
    validation_file: str | None
    user_provided_suffix: str | None
    hyperparameters: JobHyperparameters
    method: Method
    seed: int
    metadata: dict[str, str]
    integrations: list[None] = []
    result_files: list[str] = []
    error: JobError | None
    trained_tokens: int
    samples: int
    """To train on in an epoch."""
    trained_samples: int
    """In committed rounds, over all epochs."""
    rounds_committed: int
    rounds_discarded: int
    weight: float
    priority: int


class EventObject(Listed):
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, float | int | str | None]


class CheckpointMetrics(BaseModel):
    step: int
    train_loss: float | None
    valid_loss: float | None


class CheckpointObject(Listed):
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics
    fine_tuning_job_id: str


def file_object(file: JobFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_s),
        filename=file.filename,
        purpose=file.purpose,
        rows=file.rows,
        tokens=file.tokens,
    )


def job_object(job: Job) -> JobObject:
    wanted = job.hyperparameters
    shown = JobHyperparameters(
        n_epochs=wanted.n_epochs,
        batch_size=wanted.batch_size or "auto",
        learning_rate_multiplier=wanted.learning_rate_multiplier,
        max_rounds=wanted.max_rounds,
    )
    latest = pinned_name(job.adapter, job.version) if job.version else None
    return JobObject(
        id=job.id,
        created_at=int(job.created_s),
        started_at=stamp(job.started_s),
        finished_at=stamp(job.finished_s),
        status=job.status,
        model=began_from(job),
        fine_tuned_model=latest if job.ended else None,
        latest_model=latest,
        organization_id=job.owner,
        training_file=job.training_file,
        validation_file=job.validation_file or None,
        user_provided_suffix=job.suffix or None,
        hyperparameters=shown,
        method=Method(supervised=Supervised(hyperparameters=shown)),
        seed=wanted.seed,
        metadata=job.metadata,
        error=JobError(code="failed", message=job.error) if job.error else None,
        trained_tokens=job.trained_tokens,
        samples=job.samples,
        trained_samples=job.counted,
        rounds_committed=job.completed,
        rounds_discarded=job.discarded,
        weight=job.weight,
        priority=job.priority,
    )


def event_object(event: JobEvent) -> EventObject:
    return EventObject(
        id=event.id,
        created_at=int(event.created_s),
        level="error" if event.level == "error" else "warn" if event.level == "warn" else "info",
        message=event.message,
        type="metrics" if event.type == "round" else "message",
        data=event.data,
    )


def checkpoint_object(done: JobRound, adapter: str) -> CheckpointObject:
    return CheckpointObject(
        id=checkpoint_id(done.version),
        created_at=int(done.ended_s),
        fine_tuned_model_checkpoint=pinned_name(adapter, done.version),
        step_number=done.steps,
        metrics=CheckpointMetrics(step=done.steps, train_loss=done.train_loss, valid_loss=done.candidate_loss),
        fine_tuning_job_id=done.job,
    )


def checkpoint_id(version: int) -> str:
    return f"ftckpt-{version:04d}"


def began_from(job: Job) -> str:
    """The model that a job began from, or will begin from."""
    if job.base_version:
        return pinned_name(job.adapter, job.base_version)
    return BASE if job.started_s is not None or job.suffix else CLIF


def stamp(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
