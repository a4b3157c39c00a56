"""Connections of clients that send garbage, half of a request, or take nothing of an answer."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from clif.frontend import protocol
from clif.frontend.protocol import HEAD_BYTES, Connection, end_stalled, most_connections

STALL_S = 0.2


async def app(scope: Any, receive: Any, send: Any) -> None:
    """/flood: more than a client's system takes for it; otherwise the length of the body."""
    body, more = b"", True
    if scope["path"] == "/refused":
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})
        return
    if scope["path"] == "/never":
        await asyncio.Event().wait()
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/flood":
        for _ in range(200):
            await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


def against_server(client: Callable[[int, set[Any]], Awaitable[Any]], keep_alive_s: int | float = 5) -> Any:
    """client is called with the port and the open connections."""

    async def run() -> Any:
        settings = uvicorn.Config(app, port=0, http=Connection, lifespan="off", log_level="critical")
        settings.timeout_keep_alive = keep_alive_s  # type: ignore[assignment]
        server = uvicorn.Server(settings)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        connections = server.server_state.connections
        watching = asyncio.create_task(end_stalled(connections, STALL_S))
        try:
            return await asyncio.wait_for(client(server.servers[0].sockets[0].getsockname()[1], connections), 20)
        finally:
            watching.cancel()
            server.should_exit = server.force_exit = True
            await serving

    return asyncio.run(run())


def answer_to(*parts: bytes) -> bytes:
    """What a client reads until the server closes the connection."""

    async def client(port: int, connections: set[Any]) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.01)
        found = await reader.read()
        writer.close()
        return found

    got = against_server(client)
    assert isinstance(got, bytes)
    return got


def refused(answer: bytes) -> tuple[int, str]:
    """Status and message of an error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def test_a_request_is_answered_and_its_connection_closed_as_it_asks():
    request = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 3\r\n\r\n"
    assert answer_to(request, b"abc").endswith(b"3\r\n0\r\n\r\n".replace(b"3\r\n", b"1\r\n3\r\n"))


def test_garbage_gets_an_error_in_the_form_of_all_errors():
    assert refused(answer_to(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")) == (400, "this is not HTTP")
    assert refused(answer_to(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))[0] == 400


def test_a_head_of_any_length_is_refused_before_it_is_whole():
    begin, long = b"GET / HTTP/1.1\r\nhost: a\r\nx: ", b"y" * HEAD_BYTES
    assert refused(answer_to(begin, long, b"y"))[0] == 431
    assert refused(answer_to(begin + long + b"\r\n\r\n"))[0] == 431
    many = b"".join(b"x%d: y\r\n" % i for i in range(HEAD_BYTES // 6))
    assert refused(answer_to(b"GET / HTTP/1.1\r\nhost: a\r\n", many))[0] == 431
    assert refused(answer_to(b"GET /" + b"a" * HEAD_BYTES + b" HTTP/1.1\r\nhost: a\r\n\r\n"))[0] == 431


def test_a_client_that_sends_half_of_a_request_or_nothing_is_told_so_and_disconnected():
    assert refused(answer_to(b"GET / HT"))[0] == 408
    assert refused(answer_to())[0] == 408


def test_an_upgrade_is_answered_as_if_it_had_not_been_asked_for():
    asked = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n"
    assert answer_to(asked).startswith(b"HTTP/1.1 200")


def test_a_client_that_takes_nothing_of_its_answer_is_disconnected_and_nothing_of_it_stays():
    async def client(port: int, connections: set[Any]) -> int:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**10)
        writer.write(b"GET /flood HTTP/1.1\r\nhost: a\r\n\r\n")
        while not connections:
            await asyncio.sleep(0.01)
        while connections:
            await asyncio.sleep(0.01)
        writer.close()
        return len(asyncio.all_tasks())

    # This test, its client, the server, the watch: the request's task is gone.
    assert against_server(client) <= 4


async def drip(port: int, head: bytes, part: bytes) -> bytes:
    """What a client reads that sends a byte again and again, until it is disconnected."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    answer = await reader.readuntil(b"\r\n\r\n")
    while not reader.at_eof():
        writer.write(part)
        await asyncio.sleep(0.01)
    writer.close()
    return answer


def test_who_goes_on_sending_after_its_answer_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.1)
    head = b"POST /refused HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n"
    answer = against_server(lambda port, connections: drip(port, head, b"x"))
    assert answer.startswith(b"HTTP/1.1 413")


def test_bytes_that_begin_no_request_do_not_keep_a_connection() -> None:
    head = b"POST /refused HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"
    answer = against_server(lambda port, connections: drip(port, head, b"\r\n"), keep_alive_s=0.1)
    assert answer.startswith(b"HTTP/1.1 413")


def test_beyond_the_most_connections_the_longest_idle_one_gives_way_and_then_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Connection, "most", 2)
    busy = b"GET /never HTTP/1.1\r\nhost: a\r\n\r\n"

    async def client(port: int, connections: set[Any]) -> tuple[bytes, bytes, int]:
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        opened[1][1].write(busy)
        opened.append(await asyncio.open_connection("127.0.0.1", port))
        opened[2][1].write(busy)
        gave_way = await opened[0][0].read()
        while any(connection.idle for connection in connections):
            await asyncio.sleep(0.01)
        fourth, _ = await asyncio.open_connection("127.0.0.1", port)
        return gave_way, await fourth.read(), len(connections)

    gave_way, answer, left = against_server(client)
    assert gave_way == b"" and refused(answer)[0] == 503 and left == 2


def test_connections_are_as_many_as_requests_may_run_and_at_most_half_of_the_descriptors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: raised.append(limits))
    for (soft, hard), most in (((1024, 1024), 512), ((1024, 10**6), 4608), ((10**6, 10**6), 4608), ((-1, -1), 4608)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limits=(soft, hard): limits)
        assert most_connections(4096) == most
    assert raised == [(1024, 1024), (9216, 10**6)]
