"""Latency against other servers: the same arrivals for all, and figures from what came over HTTP."""

from __future__ import annotations

import json

import pytest
from latency_peers import Entrant, Latency, arrivals, latency_of, table
from lean_client import Exchange


def exchange(sent: float, stamps: list[float], status: int = 200) -> Exchange:
    """An answer whose events with text came at these moments."""
    head = f"HTTP/1.1 {status} OK\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    pieces = [(sent, head)]
    for stamp in stamps:
        data = b"data: " + json.dumps({"choices": [{"delta": {"content": "x"}}]}).encode() + b"\n\n"
        pieces.append((stamp, f"{len(data):x}\r\n".encode() + data + b"\r\n"))
    return Exchange(0, sent, [*pieces, (stamps[-1] if stamps else sent, b"0\r\n\r\n")])


def test_arrivals_are_the_same_for_all_servers_of_a_repeat_and_new_in_the_next():
    first = arrivals(1, 6.0, 20.0, 12)
    assert first == arrivals(1, 6.0, 20.0, 12) and not set(first.texts) & set(arrivals(2, 6.0, 20.0, 12).texts)
    assert 80 < len(first.at) < 160 and list(first.at) == sorted(first.at) and first.at[-1] < 20.0
    assert all(len(text.split()) == 12 for text in first.texts)


def test_latency_is_taken_from_the_moments_of_the_tokens():
    found = latency_of([exchange(1.0, [1.1, 1.2, 1.4]), exchange(2.0, [], 503), exchange(3.0, [3.1])])
    assert (found.requests, found.wrong) == (3, 2)
    assert found.ms["ttft", 50] == pytest.approx(100)
    assert found.ms["gap", 50] == pytest.approx(150) and found.ms["gap", 99] == pytest.approx(199)
    assert found.ms["end to end", 99] == pytest.approx(400)


def test_the_table_compares_within_repeats():
    def repeats(scale: float) -> list[Latency]:
        return [
            Latency({(n, q): scale * q * k for n in ("ttft", "gap", "end to end") for q in (50, 99)}, 9, 0)
            for k in (1, 2)
        ]

    lines = table([Entrant("CLIF", "", "ours", None, repeats(1.0)), Entrant("other", "", "theirs", None, repeats(2.0))])
    assert any(
        line.startswith("| CLIF | 75 (50 to 100) | 148 (99 to 198) |") and line.endswith("| 18, 0 |") for line in lines
    )
    assert any(line.startswith("| other | 0.50 (0.50 to 0.50) |") for line in lines)
    assert "* other: theirs" in lines
