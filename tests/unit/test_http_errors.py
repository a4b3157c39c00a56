"""Errors over HTTP have OpenAI's form, and bodies are read strictly."""

import asyncio
from typing import ClassVar

import httpx
import pytest
from fastapi import FastAPI, Request

from clif.errors import InputError
from clif.frontend.errors import ApiError, handle_errors, of_problem
from clif.frontend.strict import LARGE, MOST_ENTRIES, MOST_MEMBERS, Many, Strict, check_parts, parse, path_of, read_body
from clif.wire.frontend import Problem, Refused


class Inner(Strict):
    number: int


class Outer(Strict):
    inner: list[Inner]
    share: float = 0.5
    NOT_OFFERED: ClassVar = {"tools": "the model calls none"}


class Listed(Strict):
    many: Many[Inner]


def test_the_first_mistake_of_a_list_is_looked_at_alone():
    with pytest.raises(ValueError, match="1 validation error"):
        Listed.model_validate_json('{"many": [{}, {}, {}]}')


@pytest.mark.parametrize(
    "body",
    [
        "[" + ",".join(["0"] * (MOST_ENTRIES + 2)) + "]",
        "[" + ",".join(['{"a":0}'] * (MOST_MEMBERS + 1)) + "]",
        '["' + '","'.join(["a"] * MOST_ENTRIES) + '"]',
        '"\\"' * MOST_ENTRIES * 2,
    ],
)
def test_a_body_of_so_many_parts_that_all_clients_would_wait_is_refused(body):
    with pytest.raises(ApiError, match="send less at once") as refused:
        parse(Outer, body.encode())
    assert refused.value.status == 413


def test_a_long_text_may_hold_any_signs():
    check_parts(b'{"text": "' + rb"\"a\": {1, 2},\n" * LARGE + b'"}')


@pytest.mark.parametrize(
    ("body", "param", "code", "said"),
    [
        ("{", None, None, "no valid JSON"),
        ("[]", None, "invalid_value", "the body"),
        ("", "inner", "missing_required_parameter", "inner is missing"),
        ('{"inner": [{"number": "1"}]}', "inner[0].number", "invalid_value", "valid integer"),
        ('{"inner": [{"number": true}]}', "inner[0].number", "invalid_value", "valid integer"),
        ('{"inner": [], "share": NaN}', "share", "invalid_value", "finite"),
        ('{"inner": [], "share": 1, "foo": 1}', "foo", "unknown_parameter", "unknown parameter: foo"),
        ('{"inner": [{"number": 1, "bar": 1}]}', "inner[0].bar", "unknown_parameter", "inner[0].bar"),
        ('{"inner": [], "tools": []}', "tools", "unsupported_parameter", "the model calls none"),
    ],
)
def test_a_body_of_other_names_or_types_is_refused_by_the_name_of_what_is_wrong(body, param, code, said):
    with pytest.raises(ApiError) as error:
        parse(Outer, body.encode())
    assert (error.value.status, error.value.param, error.value.code) == (400, param, code)
    assert said in error.value.message


def test_a_place_in_a_body_is_written_as_a_client_would():
    assert path_of(("messages", 0, "content", 2, "text")) == "messages[0].content[2].text"


def test_the_control_process_refusals_have_a_status_each():
    assert of_problem(Problem("not_ready", "loading")).status == 503
    assert of_problem(Problem("not_ready", "loading")).headers == {"retry-after": "2"}
    assert of_problem(Problem("not_found", "no model", "model")).code == "model_not_found"
    assert of_problem(Problem("conflict", "it ended")).headers == {"x-should-retry": "false"}


def make_app() -> FastAPI:
    app = FastAPI()
    handle_errors(app)

    @app.post("/{what}")
    async def fail(what: str, request: Request, number: int = 0) -> None:
        if what == "body":
            await read_body(request, Outer)
        errors = {"refused": Refused("not_found", "no job j", "id"), "input": InputError("mend it"), "bug": KeyError(1)}
        if what in errors:
            raise errors[what]

    return app


async def ask(method: str, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(make_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://h") as client:
        return await client.request(method, path, json={} if method == "POST" else None)


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("POST", "/refused", 404, "not_found_error"),
        ("POST", "/input", 400, "invalid_request_error"),
        ("POST", "/bug", 500, "server_error"),
        ("POST", "/body", 400, "invalid_request_error"),
        ("POST", "/any?number=x", 400, "invalid_request_error"),
        ("GET", "/any", 405, "invalid_request_error"),
        ("GET", "/no/such", 404, "not_found_error"),
    ],
)
def test_every_error_of_every_route_has_the_same_form(method, path, status, kind):
    answer = asyncio.run(ask(method, path))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == kind
