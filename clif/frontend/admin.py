"""Routes of the operator, below /admin: what runs, its history, and what may be asked of it. Free of torch.

The guard in front of all routes lets only callers with an admin's key come here (clif/frontend/auth.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
from fastapi import APIRouter, Path, Request
from pydantic import Field
from sse_starlette import EventSourceResponse
from starlette.responses import Response

from clif.frontend.auth import caller_of
from clif.frontend.errors import ApiError
from clif.frontend.history import History
from clif.frontend.link import Link
from clif.frontend.strict import Strict, documented, read_body
from clif.types import CLIF
from clif.wire.frontend import (
    LONGEST_PATH,
    LONGEST_REASON,
    Actions,
    ClearCanary,
    DrainReplica,
    ExportVersion,
    GetConfig,
    ListVersions,
    LoadAdapter,
    PauseTraining,
    PinVersion,
    ResumeTraining,
    RetireAdapter,
    RollBack,
    SetCanary,
    UndrainReplica,
    UnpinVersion,
)

MOST_LIVE = 64
"""Pages that are kept up to date; each is sent some kilobytes a second."""
PING_S = 15
JSON = "application/json"
Replica = Annotated[int, Path(ge=0, le=2**31 - 1, description="Number of the replica.")]


class Why(Strict):
    reason: Annotated[str, Field(max_length=LONGEST_REASON, description="Shown wherever it has an effect.")] = ""


Version = Annotated[int, Path(ge=0, le=2**31 - 1, description="Number of the version.")]
Adapter = Annotated[str, Field(min_length=1, max_length=64, description="Name of the adapter.")]
Folder = Annotated[str, Field(min_length=1, max_length=LONGEST_PATH, description="Below serve.adapter_root.")]


class Active(Strict):
    adapter: Adapter = CLIF
    version: Annotated[int, Field(ge=0, le=2**31 - 1, description="0: the adapter answers as the base.")]


class Canary(Strict):
    version: Annotated[int, Field(ge=1, le=2**31 - 1)]
    share: Annotated[float, Field(gt=0, le=1, description="Of the requests to clif.")]


class Load(Strict):
    path: Folder
    adapter: Adapter = CLIF


class Export(Strict):
    path: Folder


WITH_REASON = documented(Why)


def routes(link: Link, history: History, stall_s: float) -> APIRouter:
    """stall_s: a page that reads nothing for longer is disconnected."""
    router = APIRouter(prefix="/admin", tags=["operation"])
    _watching(router, link, history, stall_s)
    _steering(router, link)
    _of_versions(router, link)
    return router


async def _do(link: Link, request: Request, action: Actions) -> Response:
    return Response(await link.command(action, caller_of(request).name), media_type=JSON)


def _watching(router: APIRouter, link: Link, history: History, stall_s: float) -> None:
    open_pages: set[int] = set()

    @router.get("/status")
    async def status() -> Response:
        """The run as it is: states, load, training, rounds, versions, jobs and the latest events."""
        now = link.readiness
        body = {"ready": now.ready, "reason": now.reason, "status": msgspec.Raw(now.body)}
        return Response(msgspec.json.encode(body), media_type=JSON)

    @router.get("/history")
    async def past() -> Response:
        """What it was: a row each second for ten minutes, each ten seconds for two hours, each minute for a day."""
        return Response(msgspec.json.encode(history.body()), media_type=JSON)

    @router.get("/live", response_class=EventSourceResponse)
    async def live(request: Request) -> EventSourceResponse:
        """Server-sent events, one a second: the status, a row of the history, and new events. At most 64 listen."""
        if len(open_pages) >= MOST_LIVE:
            raise ApiError(503, f"{MOST_LIVE} pages are open already", code="too_many_pages", retry_after_s=PING_S)

        async def events() -> AsyncIterator[dict[str, str]]:
            open_pages.add(id(request))
            try:
                async for message in history.messages():
                    yield {"data": message}
            finally:
                open_pages.discard(id(request))

        return EventSourceResponse(events(), ping=PING_S, send_timeout=stall_s)

    @router.get("/config")
    async def config(request: Request) -> Response:
        """The configuration as run, with all defaults."""
        return await _do(link, request, GetConfig())


def _steering(router: APIRouter, link: Link) -> None:
    @router.post("/training/pause", openapi_extra=WITH_REASON)
    async def pause(request: Request) -> Response:
        """No round begins until training is resumed; the one under way goes on to its end."""
        return await _do(link, request, PauseTraining(reason=(await read_body(request, Why)).reason))

    @router.post("/training/resume")
    async def resume(request: Request) -> Response:
        """Rounds may begin again."""
        return await _do(link, request, ResumeTraining())

    @router.post("/replicas/{replica}/drain", openapi_extra=WITH_REASON)
    async def drain(request: Request, replica: Replica) -> Response:
        """The replica gets no new request and joins no round; what it has begun goes on."""
        reason = (await read_body(request, Why)).reason
        return await _do(link, request, DrainReplica(replica=replica, reason=reason))

    @router.post("/replicas/{replica}/undrain")
    async def undrain(request: Request, replica: Replica) -> Response:
        """Requests and rounds may use the replica again."""
        return await _do(link, request, UndrainReplica(replica=replica))


def _of_versions(router: APIRouter, link: Link) -> None:
    @router.get("/versions")
    async def versions(request: Request) -> Response:
        """All adapter versions, newest first, which are active, pinned and kept, and the canary."""
        return await _do(link, request, ListVersions())

    @router.post("/versions/active", openapi_extra=documented(Active))
    async def activate(request: Request) -> Response:
        """Make a stored version the active one of its adapter: roll back, or forward again."""
        body = await read_body(request, Active)
        return await _do(link, request, RollBack(version=body.version, adapter=body.adapter))

    @router.put("/versions/canary", openapi_extra=documented(Canary))
    async def set_canary(request: Request) -> Response:
        """Let a version answer a share of the requests to clif."""
        body = await read_body(request, Canary)
        return await _do(link, request, SetCanary(version=body.version, share=body.share))

    @router.delete("/versions/canary")
    async def clear_canary(request: Request) -> Response:
        """Let the active version answer all requests to clif."""
        return await _do(link, request, ClearCanary())

    @router.post("/versions/{version}/pin")
    async def pin(request: Request, version: Version) -> Response:
        """Keep a version until it is unpinned."""
        return await _do(link, request, PinVersion(version=version))

    @router.post("/versions/{version}/unpin")
    async def unpin(request: Request, version: Version) -> Response:
        """Keep it only while it is active, the canary, or among the newest."""
        return await _do(link, request, UnpinVersion(version=version))

    @router.post("/versions/{version}/export", openapi_extra=documented(Export))
    async def export(request: Request, version: Version) -> Response:
        """Copy a version to a new folder on the server's host, in PEFT's format."""
        body = await read_body(request, Export)
        return await _do(link, request, ExportVersion(version=version, path=body.path))

    @router.post("/adapters", openapi_extra=documented(Load))
    async def load(request: Request) -> Response:
        """Make a version from a PEFT folder on the server's host. The first one of a new adapter answers at once."""
        body = await read_body(request, Load)
        return await _do(link, request, LoadAdapter(path=body.path, adapter=body.adapter))

    @router.delete("/adapters/{adapter}")
    async def retire(request: Request, adapter: Annotated[str, Path(min_length=1, max_length=64)]) -> Response:
        """Give up an adapter and its name; its versions stay stored."""
        return await _do(link, request, RetireAdapter(adapter=adapter))
