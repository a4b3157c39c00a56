"""/v1/fine_tuning/jobs: training jobs. The server decides when a step runs: serving comes first."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field

from clif.frontend.auth import Caller, caller_of
from clif.frontend.errors import ApiError, invalid
from clif.frontend.job_objects import (
    CheckpointObject,
    EventObject,
    JobObject,
    Page,
    checkpoint_object,
    event_object,
    job_object,
)
from clif.frontend.link import Link
from clif.frontend.listing import USUAL, After, Limit, Reply, check_query, not_training, sees
from clif.frontend.route_parts import Parts
from clif.frontend.strict import Strict, documented, read_body
from clif.jobs.model import HIGHEST_PRIORITY, Hyperparameters, Job, JobEvent, JobRound
from clif.wire.frontend import ChangeJob, CreateJob, GetJob, ListCheckpoints, ListJobEvents, ListJobs

USUAL_WANTS = Hyperparameters()
AUTO: Final = "auto"
CHECKPOINT = "ftckpt-"
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class HyperparametersBody(Strict):
    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] = AUTO
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = AUTO
    """Samples of an optimizer step of a replica."""
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Literal["auto"] = AUTO
    """Of train.lr."""
    max_rounds: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Committed rounds at most."""


class SupervisedBody(Strict):
    hyperparameters: HyperparametersBody | None = None


class MethodBody(Strict):
    type: Literal["supervised"]
    supervised: SupervisedBody | None = None


class JobBody(Strict):
    model: Annotated[str, Field(min_length=1, max_length=128)]
    """Where it begins: `base` for a new adapter, which `suffix` names; the adapter itself to go on from it; `clif`
    without a suffix."""
    training_file: Annotated[str, Field(min_length=1, max_length=64)]
    validation_file: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Decides which versions are promoted. Otherwise a part of the training file does."""
    suffix: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")] | None = None
    """Name of an adapter of its own."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    hyperparameters: HyperparametersBody | None = None
    """As those of method.supervised."""
    method: MethodBody | None = None
    metadata: Metadata | None = None
    weight: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    """Share of the rounds against other jobs, 1 unless it is given. For admins."""
    priority: Annotated[int, Field(ge=0, le=HIGHEST_PRIORITY)] | None = None
    """Jobs of a higher priority get all rounds that they can take. For admins."""
    NOT_OFFERED: ClassVar = {
        "integrations": "nothing is sent elsewhere",
        "method.dpo": "supervised training is what there is",
        "method.reinforcement": "supervised training is what there is",
    }

    @property
    def wanted(self) -> HyperparametersBody:
        """Raises ApiError if hyperparameters are given in both places."""
        supervised = self.method and self.method.supervised and self.method.supervised.hyperparameters
        if self.hyperparameters and supervised:
            raise invalid("hyperparameters stand in two places: leave one out", "hyperparameters")
        return self.hyperparameters or supervised or HyperparametersBody()


def routes(parts: Parts) -> APIRouter:
    router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["jobs"])
    link = parts.link

    @router.post("", openapi_extra=documented(JobBody))
    async def create_job(request: Request) -> JobObject:
        """Train on an uploaded file, in the time that serving leaves. Every round that makes it better is a version."""
        caller = check_query(request)
        body = await read_body(request, JobBody)
        if not parts.config.train.enabled:
            raise not_training()
        check_admin(caller, body)
        caller.check_model(body.suffix or body.model)
        return job_object(await _job(link, create_action(body, caller), caller))

    @router.get("")
    async def list_jobs(request: Request, after: After = None, limit: Limit = USUAL) -> Page[JobObject]:
        """The jobs that the key has created; an admin's key is shown all, also those that feedback makes."""
        caller = check_query(request, "after", "limit")
        reply = await link.command(ListJobs(after=after, limit=limit, sees=sees(caller)), caller.name)
        found = msgspec.json.decode(reply, type=Reply)
        jobs = [job_object(msgspec.json.decode(raw, type=Job)) for raw in found.data]
        return Page[JobObject].of(jobs, found.has_more)

    @router.get("/{job_id}")
    async def get_job(request: Request, job_id: str) -> JobObject:
        """A job as it stands."""
        caller = check_query(request)
        return job_object(await _job(link, GetJob(id=job_id, sees=sees(caller)), caller))

    @router.post("/{job_id}/cancel")
    async def cancel_job(request: Request, job_id: str) -> JobObject:
        """End a job. What it has promoted stays."""
        return await _changed(link, request, job_id, "cancel")

    @router.post("/{job_id}/pause")
    async def pause_job(request: Request, job_id: str) -> JobObject:
        """Begin no further round of a job until it is resumed."""
        return await _changed(link, request, job_id, "pause")

    @router.post("/{job_id}/resume")
    async def resume_job(request: Request, job_id: str) -> JobObject:
        """Go on with a paused job."""
        return await _changed(link, request, job_id, "resume")

    @router.get("/{job_id}/events")
    async def list_events(
        request: Request, job_id: str, after: After = None, limit: Limit = USUAL
    ) -> Page[EventObject]:
        """What has happened to a job, each round with its losses."""
        caller = check_query(request, "after", "limit")
        action = ListJobEvents(id=job_id, after=after, limit=limit, sees=sees(caller))
        found = msgspec.json.decode(await link.command(action, caller.name), type=Reply)
        events = [event_object(msgspec.json.decode(raw, type=JobEvent)) for raw in found.data]
        return Page[EventObject].of(events, found.has_more)

    @router.get("/{job_id}/checkpoints")
    async def list_checkpoints(
        request: Request, job_id: str, after: After = None, limit: Limit = USUAL
    ) -> Page[CheckpointObject]:
        """The versions that a job has made."""
        caller = check_query(request, "after", "limit")
        job = await _job(link, GetJob(id=job_id, sees=sees(caller)), caller)
        action = ListCheckpoints(id=job_id, after=version_after(after), limit=limit, sees=sees(caller))
        found = msgspec.json.decode(await link.command(action, caller.name), type=Reply)
        rounds = [msgspec.json.decode(raw, type=JobRound) for raw in found.data]
        return Page[CheckpointObject].of([checkpoint_object(done, job.adapter) for done in rounds], found.has_more)

    return router


def create_action(body: JobBody, caller: Caller) -> CreateJob:
    wanted = body.wanted
    return CreateJob(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file or "",
        suffix=body.suffix or "",
        n_epochs=USUAL_WANTS.n_epochs if wanted.n_epochs == AUTO else wanted.n_epochs,
        batch_size=0 if wanted.batch_size == AUTO else wanted.batch_size,
        learning_rate_multiplier=1.0 if wanted.learning_rate_multiplier == AUTO else wanted.learning_rate_multiplier,
        seed=body.seed or 0,
        max_rounds=wanted.max_rounds,
        weight=1.0 if body.weight is None else body.weight,
        priority=body.priority or 0,
        metadata=body.metadata or {},
        owner=caller.name,
        sees=sees(caller),
    )


def check_admin(caller: Caller, body: JobBody) -> None:
    """Raises ApiError for what only an admin may ask: it takes rounds from other clients' jobs."""
    for name in ("weight", "priority"):
        if getattr(body, name) is not None and not caller.admin:
            raise ApiError(403, f"{name} is for admins", name, "admin_only")


def version_after(after: str | None) -> int | None:
    """The version of a checkpoint's id. Raises ApiError."""
    if after is None:
        return None
    number = after.removeprefix(CHECKPOINT)
    if not (number.isascii() and number.isdecimal() and len(number) < 12) or number == after:
        raise invalid(f"there is no checkpoint {after} to begin after", "after")
    return int(number)


async def _job(link: Link, action: CreateJob | GetJob | ChangeJob, caller: Caller) -> Job:
    return msgspec.json.decode(await link.command(action, caller.name), type=Job)


async def _changed(
    link: Link, request: Request, job_id: str, change: Literal["cancel", "pause", "resume"]
) -> JobObject:
    caller = caller_of(request)
    return job_object(await _job(link, ChangeJob(id=job_id, change=change, sees=sees(caller)), caller))
