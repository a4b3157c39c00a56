"""/v1/files: rows to train on."""

from __future__ import annotations

from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import FileResponse, Response

from clif.errors import plain
from clif.frontend.auth import caller_of
from clif.frontend.errors import ApiError, invalid
from clif.frontend.file_store import FileStore
from clif.frontend.job_objects import FileDeleted, FileObject, Page, file_object
from clif.frontend.limits import FORM_BYTES
from clif.frontend.link import Link
from clif.frontend.listing import USUAL, After, Reply, check_query, not_training, only, sees
from clif.frontend.route_parts import Parts
from clif.jobs.model import JobFile
from clif.storage.disk_space import is_full
from clif.wire.frontend import DeleteFile, GetFile, ListFiles, Refused, RegisterFile

PURPOSE = "fine-tune"
LONGEST_NAME = 255
FIELDS = ("file", "purpose")
FORM: dict[str, Any] = {
    "type": "object",
    "required": [*FIELDS],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSON lines, a row to train on in each."},
        "purpose": {"type": "string", "enum": [PURPOSE]},
    },
}


def routes(parts: Parts) -> APIRouter:
    router = APIRouter(prefix="/v1/files", tags=["files"])
    link, store = parts.link, FileStore(parts.config, parts.tokenizer)

    @router.post(
        "", openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}
    )
    async def create_file(request: Request) -> FileObject:
        """Upload rows. They are read before the answer comes: a mistake is refused with its line."""
        caller = check_query(request)
        if not parts.config.train.enabled:
            raise not_training()
        await check_room(store, request)
        async with request.form(max_files=1, max_fields=len(FIELDS), max_part_size=FORM_BYTES) as form:
            upload = the_file(form)
            try:
                stored = await store.take(upload.file)
            except ValueError as error:
                raise invalid(str(error), "file", "invalid_file") from error
            except OSError as error:
                raise not_kept(error) from error
            name = file_name(upload.filename)
        action = RegisterFile(
            id=stored.id,
            filename=name,
            bytes=stored.bytes,
            rows=stored.rows,
            tokens=stored.tokens,
            longest=stored.longest,
            owner=caller.name,
            sees=sees(caller),
        )
        reply = await register(link, store, action)
        return file_object(msgspec.json.decode(reply, type=JobFile))

    @router.get("")
    async def list_files(
        request: Request,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10_000, description="Entries at most.")] = USUAL,
        order: Annotated[str | None, Query(description="desc: the newest first; there is no other.")] = None,
        purpose: Annotated[str | None, Query(description=f"{PURPOSE}; there is no other.")] = None,
    ) -> Page[FileObject]:
        """The files that the key has uploaded; an admin's key is shown all."""
        caller = check_query(request, "after", "limit", "order", "purpose")
        only("order", order, "desc")
        only("purpose", purpose, PURPOSE)
        reply = await link.command(ListFiles(after=after, limit=limit, sees=sees(caller)), caller.name)
        found = msgspec.json.decode(reply, type=Reply)
        files = [file_object(msgspec.json.decode(raw, type=JobFile)) for raw in found.data]
        return Page[FileObject].of(files, found.has_more)

    async def known(request: Request, file_id: str) -> JobFile:
        caller = caller_of(request)
        reply = await link.command(GetFile(id=file_id, sees=sees(caller)), caller.name)
        return msgspec.json.decode(reply, type=JobFile)

    @router.get("/{file_id}")
    async def get_file(request: Request, file_id: str) -> FileObject:
        """A file, without its content."""
        return file_object(await known(request, file_id))

    @router.get("/{file_id}/content", response_class=FileResponse)
    async def get_content(request: Request, file_id: str) -> Response:
        """The rows as they were uploaded."""
        file = await known(request, file_id)
        path = store.path(file.id)
        if not path.is_file():
            raise ApiError(404, f"the content of {file.id} is not there any more")
        return FileResponse(path, media_type="application/octet-stream", filename=file.filename)

    @router.delete("/{file_id}")
    async def delete_file(request: Request, file_id: str) -> FileDeleted:
        """Forget a file, unless a job that has not ended needs it."""
        caller = caller_of(request)
        await link.command(DeleteFile(id=file_id, sees=sees(caller)), caller.name)
        await store.remove(file_id)
        return FileDeleted(id=file_id)

    return router


async def check_room(store: FileStore, request: Request) -> None:
    """Raises ApiError before the body of an upload comes, which would lie on a disk too."""
    length = request.headers.get("content-length", "")
    try:
        await store.check_room(int(length) if length.isdecimal() else 0)
    except OSError as error:
        raise not_kept(error) from error


def not_kept(error: OSError) -> ApiError:
    """The disk of the server does not take a file."""
    if is_full(error):
        message = "the server has no room for this file (jobs.min_free_gib): delete files that are not needed any more"
        return ApiError(507, message, "file", "no_room")
    return ApiError(500, f"the file cannot be kept ({error.strerror})", "file")


async def register(link: Link, store: FileStore, action: RegisterFile) -> bytes:
    """Raises Refused; then nothing is kept of the file, unless the reply is lost: the file may be registered."""
    try:
        return await link.command(action, action.owner)
    except Refused as refused:
        if refused.problem.kind != "not_ready":
            await store.remove(action.id)
        raise


def the_file(form: FormData) -> UploadFile:
    """The file of an upload. Raises ApiError for a form that is no upload."""
    for name in form:
        if name not in FIELDS:
            raise invalid(f"unknown parameter: {plain(name, 80)}", plain(name, 80), "unknown_parameter")
    upload, purpose = form.get("file"), form.get("purpose")
    if purpose is None:
        raise invalid("purpose is missing", "purpose", "missing_required_parameter")
    if purpose != PURPOSE:
        raise invalid(f"purpose must be {PURPOSE}", "purpose", "invalid_value")
    if not isinstance(upload, UploadFile):
        raise invalid("file is missing: send it as a part with a filename", "file", "missing_required_parameter")
    return upload


def file_name(given: str | None) -> str:
    """The last part of a name, fit to be shown."""
    last = PureWindowsPath(PurePosixPath(given or "").name).name
    return plain(last, LONGEST_NAME - 5) or "file.jsonl"
