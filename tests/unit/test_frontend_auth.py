"""Keys of clients: what is kept of them, who gets in (promise 9), and what each may use up."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from typer.testing import CliRunner

from clif.cli import app as cli
from clif.config import config_from_tree
from clif.config.serve import HttpConfig
from clif.errors import InputError
from clif.frontend import limits
from clif.frontend.auth import Access, caller_of
from clif.frontend.errors import ApiError, handle_errors
from clif.frontend.limits import Guard
from clif.frontend.quotas import Bucket, duration
from clif.rank.preflight import check_access
from clif.run import hash_variable
from clif.storage.api_keys import ApiKey, from_variable, hash_of, keys_at, line_of, new_key, parse_keys, read_keys

SECRET, OTHER, BOSS = new_key(), new_key(), new_key()


def key(secret: str = SECRET, name: str = "me", **options: Any) -> ApiKey:
    return ApiKey(name=name, sha256=hash_of(secret), **options)


def write(path: Path, *keys: ApiKey) -> Path:
    path.write_text("".join(line_of(k) + "\n" for k in keys))
    path.chmod(0o600)
    return path


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Site:
    """Routes behind the guard, called over ASGI."""

    def __init__(self, *keys: ApiKey, http: HttpConfig | None = None, access: Access | None = None) -> None:
        self.clock = Clock()
        self.began, self.go_on = asyncio.Event(), asyncio.Event()
        routes = [Route(p, self.whoami, methods=["GET", "POST"]) for p in ("/health", "/v1/models", "/admin/x")]
        routes.append(Route("/v1/slow", self.slow, methods=["POST"]))
        app: Any = Starlette(routes=routes)
        handle_errors(app)
        self.app = Guard(app, access or Access(lambda: keys, clock=self.clock), http or HttpConfig())

    async def whoami(self, request: Request) -> Response:
        return JSONResponse({"name": caller_of(request).name, "bytes": len(await request.body())})

    async def slow(self, request: Request) -> Response:
        await request.body()
        self.began.set()
        await self.go_on.wait()
        return Response()

    def client(self, secret: str | None = SECRET, **headers: str) -> httpx.AsyncClient:
        if secret is not None:
            headers["authorization"] = f"Bearer {secret}"
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", headers=headers)

    def get(self, path: str = "/v1/models", secret: str | None = SECRET, **headers: str) -> httpx.Response:
        async def got() -> httpx.Response:
            async with self.client(secret, **headers) as client:
                return await client.get(path)

        return asyncio.run(got())


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_new_key_is_shown_once_and_the_file_holds_its_hash_alone(tmp_path):
    file = tmp_path / "keys.jsonl"
    done = CliRunner().invoke(cli, ["keys", "new", "me", "--file", str(file), "--requests-per-minute", "5"])
    assert done.exit_code == 0
    secret = done.stdout.strip()
    assert len(secret) == 48 and secret not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    assert read_keys(file) == (key(secret, requests_per_minute=5),)
    assert CliRunner().invoke(cli, ["keys", "new", "you", "--file", str(file), "--admin"]).exit_code == 0
    assert [(k.name, k.role) for k in read_keys(file)] == [("me", "user"), ("you", "admin")]
    assert CliRunner().invoke(cli, ["keys", "hash"], input=f"{secret}\n").stdout.strip() == hash_of(secret)


def test_a_line_is_added_to_a_file_that_ends_without_a_newline(tmp_path):
    file = write(tmp_path / "keys", key())
    file.write_text(file.read_text().strip())
    CliRunner().invoke(cli, ["keys", "new", "you", "--file", str(file)])
    assert [k.name for k in read_keys(file)] == ["me", "you"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense", "line 1: JSON is malformed"),
        (line_of(key()) + "\n" + line_of(key(OTHER)), "has the key me twice"),
        (line_of(key()) + "\n" + line_of(key(name="you")), "has the key you twice"),
        ('{"name":"a b","sha256":"' + "0" * 64 + '"}', "line 1: .*name"),
        ('{"name":"a","sha256":"00"}', "line 1: .*sha256"),
        ('{"name":"a","sha256":"' + "0" * 64 + '","quota":1}', "line 1: .*unknown field `quota`"),
        ('{"name":"a","sha256":"' + "0" * 64 + '","max_tokens":0}', "line 1: .*max_tokens"),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_refused_with_its_line(text, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_keys(text, "the file")


@pytest.mark.parametrize(("mode", "sentence"), [(0o640, "open to other users: chmod 600"), (None, "cannot be read")])
def test_a_file_of_keys_that_others_read_or_that_is_missing_is_refused(tmp_path, mode, sentence):
    file = tmp_path / "keys"
    if mode:
        write(file, key()).chmod(mode)
    with pytest.raises(InputError, match=rf"serve\.http\.keys_file .*{sentence}"):
        read_keys(file)


def test_keys_of_the_environment_are_hashed_before_any_child_gets_them():
    environ = {"CLIF_API_KEYS": f"me:{SECRET}, boss:{BOSS}:admin"}
    hash_variable(environ)
    assert SECRET not in environ["CLIF_API_KEYS"] and BOSS not in environ["CLIF_API_KEYS"]
    hash_variable(environ)
    assert from_variable(environ["CLIF_API_KEYS"]) == (key(), key(BOSS, "boss", role="admin"))


@pytest.mark.parametrize(
    "value",
    [SECRET, "me:short", f"a b:{SECRET}", f"me:{SECRET}:root", "me:sha256=00"],
    # The lanes of a run must agree on names, and each has keys of its own.
    ids=["no name", "short", "bad name", "bad role", "short hash"],
)
def test_a_variable_without_keys_is_refused_without_showing_it(value):
    with pytest.raises(InputError, match="entry 1 of CLIF_API_KEYS is no key") as caught:
        from_variable(value)
    assert SECRET not in str(caught.value)


def test_a_server_that_other_hosts_reach_needs_keys(tmp_path, monkeypatch):
    monkeypatch.delenv("CLIF_API_KEYS", raising=False)

    def check(host: str, **http: Any) -> None:
        tree = {"model": {"path": "fake"}, "serve": {"http": {"port": 0, "host": host, **http}}}
        check_access(config_from_tree(tree))

    check("127.0.0.1")
    check("::1")
    with pytest.raises(InputError, match=r"serve\.http\.host 0\.0\.0\.0 is reached by other hosts"):
        check("0.0.0.0")
    check("0.0.0.0", keys_file=str(write(tmp_path / "keys", key())))
    with pytest.raises(InputError, match="holds no key"):
        check("0.0.0.0", keys_file=str(write(tmp_path / "keys")))
    monkeypatch.setenv("CLIF_API_KEYS", f"me:{SECRET}")
    check("0.0.0.0")


# --- who gets in -----------------------------------------------------------------------------------------------------


def test_every_route_but_health_needs_a_key():
    site = Site(key())
    assert site.get("/health", None).status_code == 200
    assert site.get("/health", "wrong").status_code == 200
    for secret, sentence in ((None, "no API key"), (OTHER, "wrong API key"), (hash_of(SECRET), "wrong API key")):
        refused = site.get(secret=secret)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        error = refused.json()["error"]
        assert sentence in error["message"] and error["type"] == "authentication_error"
        assert error["code"] == "invalid_api_key"
    assert site.get().json()["name"] == "me"
    # Also for a route that does not exist.
    assert site.get("/nowhere", None).status_code == 401 and site.get("/nowhere").status_code == 404


def test_only_an_admin_gets_to_the_admins_routes():
    site = Site(key(), key(BOSS, "boss", role="admin"))
    refused = site.get("/admin/x")
    assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
    assert site.get("/admin/x", BOSS).json()["name"] == "boss"


def test_a_key_that_is_taken_out_of_the_file_is_refused_while_the_server_runs(tmp_path, caplog):
    file = write(tmp_path / "keys", key(), key(OTHER, "you"))
    clock = Clock()
    access = Access(lambda: read_keys(file), lambda: (file.stat().st_mtime_ns, file.stat().st_size), clock=clock)
    site = Site(access=access)
    assert site.get().status_code == site.get(secret=OTHER).status_code == 200
    write(file, key(OTHER, "you"))
    os.utime(file, (1, 1))
    clock.now += 1.0
    assert site.get().status_code == 401 and site.get(secret=OTHER).status_code == 200
    # What cannot be read changes nothing, and is said.
    file.write_text("half a li")
    clock.now += 1.0
    assert site.get().status_code == 401 and site.get(secret=OTHER).status_code == 200
    assert "the API keys stay as they were" in caplog.text


def test_without_keys_a_page_of_another_origin_or_name_gets_nothing():
    site = Site()
    assert site.get(secret=None).json()["name"] == ""
    assert site.get("/admin/x", secret=None).status_code == 200
    assert site.get(secret=None, host="localhost:8000", origin="http://localhost:8000").status_code == 200
    assert site.get(secret=None, host="evil.example").status_code == 403
    assert site.get(secret=None, host="[bad").status_code == 403
    assert site.get(secret=None, origin="http://evil.example").status_code == 403
    assert site.get(secret=None, origin="null").status_code == 403


def test_a_server_without_keys_that_others_reach_does_not_begin():
    with pytest.raises(InputError, match="reached by other hosts"):
        Access.configured(HttpConfig(port=0, host="0.0.0.0"), {})
    assert keys_at(None, {}, "127.0.0.1", True) == ()


# --- quotas ----------------------------------------------------------------------------------------------------------


def test_a_bucket_gives_what_has_come_in_and_says_when_there_is_more():
    clock = Clock()
    bucket = Bucket(60, 60.0, clock)
    bucket.charge(59)
    assert bucket.wait_s(1) == 0 and bucket.wait_s(3) == pytest.approx(2.0) and bucket.wait_s(61) == float("inf")
    bucket.charge(11)
    assert bucket.wait_s(1) == pytest.approx(11.0) and bucket.full_in_s == pytest.approx(70.0)
    clock.now += 1000
    assert bucket.level == 60
    clock.now -= 500
    assert bucket.level == 60


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0ms"), (0.85, "850ms"), (1.2, "2s"), (60, "1m0s"), (359.5, "6m0s")]
)
def test_durations_are_written_as_openai_does(seconds, shown):
    assert duration(seconds) == shown


def test_a_key_gets_as_many_requests_a_minute_as_it_may_and_is_told_how_many_are_left():
    site = Site(key(requests_per_minute=2), key(OTHER, "you"))
    assert site.get().headers["x-ratelimit-remaining-requests"] == "1"
    answered = site.get()
    assert answered.headers["x-ratelimit-remaining-requests"] == "0"
    assert answered.headers["x-ratelimit-limit-requests"] == "2"
    assert answered.headers["x-ratelimit-reset-requests"] == "1m0s"
    refused = site.get()
    assert refused.status_code == 429 and refused.headers["retry-after"] == "30"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert site.get(secret=OTHER).status_code == 200 and site.get("/health").status_code == 200
    site.clock.now += 30
    assert site.get().status_code == 200 and site.get().status_code == 429


def test_tokens_of_answers_count_against_the_requests_that_follow():
    clock = Clock()
    access = Access(lambda: (key(tokens_per_minute=100),), clock=clock)
    caller = access.caller({"path": "/", "headers": [(b"authorization", f"Bearer {SECRET}".encode())]})
    caller.charge_prompt(60)
    caller.charge_answer(100)
    with pytest.raises(ApiError, match=r"100 tokens of the key me in a minute: try again in 66\.0 s") as caught:
        caller.charge_prompt(50)
    assert caught.value.retry_after_s == pytest.approx(66.0)
    with pytest.raises(ApiError, match="101 exceed the quota"):
        caller.charge_prompt(101)


def test_a_key_with_models_gets_these_and_their_versions():
    access = Access(lambda: (key(models=("clif",)),))
    caller = access.caller({"path": "/", "headers": [(b"authorization", f"bearer {SECRET}".encode())]})
    caller.check_model("clif")
    caller.check_model("clif@v0007")
    with pytest.raises(ApiError, match="the key me may not use the model base"):
        caller.check_model("base")


def test_a_key_runs_as_many_requests_at_the_same_time_as_it_may():
    site = Site(key(max_running=1))

    async def both() -> tuple[int, int, int]:
        async with site.client() as client:
            first = asyncio.create_task(client.post("/v1/slow"))
            await site.began.wait()
            second = await client.post("/v1/slow")
            site.go_on.set()
            return second.status_code, (await first).status_code, (await client.post("/v1/slow")).status_code

    assert asyncio.run(both()) == (429, 200, 200)


# --- bodies ----------------------------------------------------------------------------------------------------------


def post(site: Site, receive: Callable[[], Any], path: str = "/v1/models") -> tuple[int, bytes]:
    """Status and body of the answer to a request whose body comes as receive() gives it."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
    asyncio.run(site.app(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_a_body_is_counted_as_it_comes_and_not_as_its_header_says():
    site, parts = Site(http=HttpConfig(max_body_mib=1)), 0

    async def receive() -> Any:
        nonlocal parts
        parts += 1
        return {"type": "http.request", "body": b"x" * 2**19, "more_body": True}

    status, body = post(site, receive)
    assert (status, parts) == (413, 3) and b"the body exceeds 1 MiB" in body


def test_bodies_of_all_clients_together_are_bounded_and_given_back(monkeypatch):
    monkeypatch.setattr(limits, "MOST_BODIES", 2)
    site = Site(http=HttpConfig(max_body_mib=1))

    async def all_of() -> tuple[list[int], int]:
        async with site.client(secret=None) as client:
            slow = [asyncio.create_task(client.post("/v1/slow", content=b"x" * 2**20)) for _ in range(2)]
            while site.app._held.now < 2 * 2**20:
                await asyncio.sleep(0)
            refused = await client.post("/v1/models", content=b"x" * 2**20)
            site.go_on.set()
            statuses = [refused.status_code, *[(await task).status_code for task in slow]]
            return [*statuses, (await client.post("/v1/models", content=b"x" * 2**20)).status_code], site.app._held.now

    assert asyncio.run(all_of()) == ([503, 200, 200, 200], 0)


def test_a_body_that_stops_coming_is_given_up():
    site, first = Site(http=HttpConfig(stall_s=0.01)), True

    async def receive() -> Any:
        nonlocal first
        if not first:
            await asyncio.Event().wait()
        first = False
        return {"type": "http.request", "body": b"x", "more_body": True}

    status, body = post(site, receive)
    assert status == 408 and b"serve.http.stall_s" in body
