"""The lean client of the benchmarks takes an answer apart as it came, and stamps each token with the right piece."""

from __future__ import annotations

import frontend as bench
import pytest
from lean_client import Exchange, _is_whole

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def event(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"' + text.encode() + b'"}}]}\n\n'


def chunk(payload: bytes) -> bytes:
    return f"{len(payload):x}\r\n".encode() + payload + b"\r\n"


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_events_are_found_however_the_bytes_are_cut(size):
    raw = HEAD + chunk(event("a") + event("b")) + chunk(event("cd")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    pieces = [(float(at), raw[at : at + size]) for at in range(0, len(raw), size)]
    found = Exchange(1, pieces=pieces).events()
    assert [e["choices"][0]["delta"]["content"] for _, e in found] == ["a", "b", "cd"]
    stamps = [stamp for stamp, _ in found]
    assert stamps == sorted(stamps) and Exchange(1, pieces=pieces).status == 200
    # An event is there once its chunk is.
    assert stamps[-1] + size > raw.index(b'"cd"')


def test_the_end_of_an_answer_with_a_length_is_known():
    error = b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\n"
    assert not _is_whole([(0.0, error + b"no")])
    assert _is_whole([(0.0, error + b"no"), (1.0, b"pe")])
    assert not _is_whole([(0.0, HEAD)])


def test_latency_added_is_the_clients_less_the_engines(monkeypatch):
    """The client's question takes 2 ms to the engine, and each token 3 ms back."""
    monkeypatch.setattr(bench, "ANSWER_TOKENS", 3)
    sent = [1.010, 1.020, 1.030]
    pieces = [(at + 0.003, (HEAD if i == 0 else b"") + chunk(event("x"))) for i, at in enumerate(sent)]
    exchange = Exchange(7, sent_s=0.998, pieces=pieces)
    added = bench.compare(bench.Repeat([exchange], {}, 1.0), {"submitted": {7: 1.000}, "sent": {7: sent}})
    assert (added.there, added.back, added.ttft) == pytest.approx((2.0, 3.0, 5.0))
    assert (added.delay, added.engine_tpot) == pytest.approx((3.0, 10.0))
    assert added.tpot == pytest.approx(0.0, abs=1e-9)
