"""What a client is told when its request cannot be carried out: {"error": {message, type, param, code}}, OpenAI's form.

The status is what clients act on: libraries make a class of exception from it, and come again after 429 and 503.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from clif.errors import InputError
from clif.wire.frontend import Kind, Problem, Refused

log = logging.getLogger(__name__)
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
    507: "server_error",
}
"""Type of an error by its status."""
STATUS: Mapping[Kind, int] = {
    "invalid": 400,
    "forbidden": 403,
    "not_found": 404,
    "conflict": 409,
    "too_many": 429,
    "failed": 500,
    "not_ready": 503,
}
"""Status of what the control process refuses."""
NOT_READY_S = 2.0
"""A model is loaded within seconds or minutes: a client that comes again this often costs nothing."""


class ApiError(Exception):
    """An answer that is an error. param: the argument that is to change. code: for programs.

    retry_after_s: a client that comes again earlier is likely refused again; None: coming again does not help, or the
    time is not known.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def body(self) -> bytes:
        shown = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": shown})

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        # Clients come again by themselves after a conflict and after 5xx.
        return {"x-should-retry": "false"} if self.status in (409, 500, 504, 507) else {}

    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, "application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request itself is wrong."""
    return ApiError(400, message, param, code)


def of_problem(problem: Problem) -> ApiError:
    """What the control process refused."""
    retry_after_s = NOT_READY_S if problem.kind == "not_ready" else None
    code = "model_not_found" if (problem.kind, problem.param) == ("not_found", "model") else None
    return ApiError(STATUS[problem.kind], problem.message, problem.param, code, retry_after_s)


def handle_errors(app: FastAPI) -> None:
    """Every error of every route gets the form above."""
    app.add_exception_handler(ApiError, _of_api)
    app.add_exception_handler(Refused, _of_refused)
    app.add_exception_handler(InputError, _of_input)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(Exception, _of_bug)


async def _of_api(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _of_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return of_problem(error.problem).response()


async def _of_input(request: Request, error: Exception) -> Response:
    return invalid(str(error)).response()


async def _of_http(request: Request, error: Exception) -> Response:
    """Of the framework: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    unknown = f"there is no {request.method} {request.url.path}"
    message = unknown if error.status_code in (404, 405) else str(error.detail)
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def _of_validation(request: Request, error: Exception) -> Response:
    """Of a path or a query: bodies are read by strict.py."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The first part says where it stands: in the path or in the query.
    name = ".".join(str(part) for part in first["loc"][1:])
    return invalid(f"{name}: {first['msg']}", name or None).response()


async def _of_bug(request: Request, error: Exception) -> Response:
    """The server logs the traceback, which holds no prompt; the client is told the class alone."""
    return ApiError(500, f"the server failed ({type(error).__name__}): its log says more").response()
