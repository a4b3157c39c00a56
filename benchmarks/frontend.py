"""What the HTTP front end costs, with an emulated engine: latency added, streams held open, short answers a second.

    python benchmarks/frontend.py --out benchmarks/frontend-DATE.md [--only added held short freed]

Latency added: stamps of the client less stamps of the engine for the same tokens, on the clock that all processes of a
host share. A client process, the front end, the control process and the engine share the cores.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import checkout  # noqa: F401
import msgspec
import numpy as np
import typer
import uvloop
from freed_blocks import measure_freed
from lean_client import Connection, Exchange, chat_request, connect, has_text
from served import Served

from clif.metrics.provenance import cpu_model, git_commit
from clif.storage.files import allow_connections

STREAMS, ANSWER_TOKENS = 64, 100
PAUSE_S = 0.05
PACKAGES = ("fastapi", "uvicorn", "uvloop", "httptools", "sse-starlette", "msgspec", "pyzmq", "tokenizers")
EMULATED = ("train.enabled=false", "model.max_context=512")
PARTS = ("added", "held", "short", "freed")
LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"model":"clif","messages":[{"role":"user","content":"hello"}],"max_tokens":8,"ignore_eos":true}'
"""


# --- latency added -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repeat:
    """One window of measurement. cpu_ms: of each process, per token. seconds: its length."""

    exchanges: list[Exchange]
    cpu_ms: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Added:
    """Medians over the requests or tokens of a repeat, milliseconds; delay99: 99 % of tokens are within."""

    requests: int
    tokens_per_s: float
    ttft: float
    ttft99: float
    there: float
    back: float
    tpot: float
    delay: float
    delay99: float
    engine_tpot: float


async def window(url: str, numbers: Iterable[int], seconds: float) -> list[Exchange]:
    """STREAMS streams that each ask again when an answer has ended; not those that the end of the window cuts."""
    found: list[Exchange] = []
    connections = [await connect(url) for _ in range(STREAMS)]
    end = time.monotonic() + seconds

    async def work(index: int, connection: Connection) -> None:
        # Spread over the length of an answer, as clients that know nothing of each other are.
        await asyncio.sleep(index / STREAMS)
        while time.monotonic() < end:
            number = next(counter)
            found.append(await connection.ask(Exchange(number), chat_request(url, number, ANSWER_TOKENS)))
            # A question that follows at once would always come while the tokens of the other streams do.
            await asyncio.sleep(random.uniform(0, PAUSE_S))

    counter = iter(numbers)
    await asyncio.gather(*(work(i, c) for i, c in enumerate(connections)))
    for connection in connections:
        connection.close()
    return found


def measure_added(folder: Path, step_ms: float, repeats: int, seconds: float) -> tuple[list[Added], list[Repeat]]:
    folder.mkdir()
    stamps = folder / "stamps"
    sizes = [f"engine.max_batch={2 * STREAMS}", "engine.kv_tokens=131072", f"engine.emulated={step_ms}"]
    numbers, taken = itertools.count(1), []
    with Served(folder, *EMULATED, *sizes, stamps=stamps) as server:
        uvloop.run(window(server.url, numbers, 2.0))
        for _ in range(repeats):
            before, began, own = server.cpu_s(), time.monotonic(), time.process_time()
            exchanges = uvloop.run(window(server.url, numbers, seconds))
            took, after = time.monotonic() - began, server.cpu_s()
            count = ANSWER_TOKENS * len(exchanges)
            cpu = {name: 1000 * (after[name] - before[name]) / count for name in sorted(after)}
            cpu["client"] = 1000 * (time.process_time() - own) / count
            taken.append(Repeat(exchanges, cpu, took))
    engine = msgspec.msgpack.decode(stamps.read_bytes(), strict=False)
    return [compare(repeat, engine) for repeat in taken], taken


def compare(repeat: Repeat, engine: dict[str, dict[int, Any]]) -> Added:
    ttft, there, back, tpot, delay, own = [], [], [], [], [], []
    for exchange in repeat.exchanges:
        assert exchange.status == 200 and not exchange.error, (exchange.status, exchange.error, exchange.pieces[:2])
        sent = engine["sent"][exchange.number]
        assert len(sent) == ANSWER_TOKENS, f"{len(sent)} tokens of request {exchange.number}"
        events = [(stamp, event) for stamp, event in exchange.events() if has_text(event)]
        stamps = list(token_stamps(events))
        assert len(stamps) == ANSWER_TOKENS, f"{len(stamps)} tokens came of request {exchange.number}"
        submitted = engine["submitted"][exchange.number]
        there.append(submitted - exchange.sent_s)
        back.append(stamps[0] - sent[0])
        ttft.append(there[-1] + back[-1])
        tpot.append(((stamps[-1] - stamps[0]) - (sent[-1] - sent[0])) / (ANSWER_TOKENS - 1))
        own.append((sent[-1] - sent[0]) / (ANSWER_TOKENS - 1))
        delay += [at - left for at, left in zip(stamps, sent, strict=True)]
    tokens = ANSWER_TOKENS * len(repeat.exchanges)
    first = np.median(ttft), np.percentile(ttft, 99), np.median(there), np.median(back)
    later = np.median(tpot), np.median(delay), np.percentile(delay, 99), np.median(own)
    return Added(len(repeat.exchanges), tokens / repeat.seconds, *(1000 * float(v) for v in (*first, *later)))


def token_stamps(events: Sequence[tuple[float, Any]]) -> Iterable[float]:
    """A stamp for each token: of the byte tokenizer each character of the text is one."""
    for stamp, event in events:
        for choice in event["choices"]:
            yield from [stamp] * len(choice["delta"]["content"])


def added_lines(folder: Path, steps: Sequence[float], repeats: int, seconds: float) -> Iterable[str]:
    yield f"## Latency added, {STREAMS} streams"
    yield ""
    yield (
        f"Each stream asks for {ANSWER_TOKENS} tokens, again and again; {repeats} windows of {seconds:g} s. Medians "
        "over requests or tokens of a window, then the median of the windows and, in brackets, their least and "
        "greatest. Delay: from the engine's sending of a token to its arrival at the client. Milliseconds."
    )
    yield ""
    yield (
        "| step | tokens/s | TTFT added | its p99 | to the engine | first token back | TPOT added | delay of a token | "
        "its p99 | engine's TPOT |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    costs = []
    for step in steps:
        found, taken = measure_added(folder / f"added-{step:g}", step, repeats, seconds)
        names = tuple(Added.__dataclass_fields__)[1:]
        yield f"| {step:g} | " + " | ".join(spread([getattr(a, name) for a in found]) for name in names) + " |"
        costs.append((step, {name: spread([r.cpu_ms[name] for r in taken]) for name in taken[0].cpu_ms}))
    yield ""
    yield "CPU time per token, milliseconds:"
    yield ""
    yield f"| step | {' | '.join(costs[0][1])} |"
    yield f"|{'---|' * (len(costs[0][1]) + 1)}"
    for step, cost in costs:
        yield f"| {step:g} | {' | '.join(cost.values())} |"
    yield ""


def spread(values: Sequence[float]) -> str:
    return f"{show(statistics.median(values))} ({show(min(values))} to {show(max(values))})"


def show(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- streams held open ---------------------------------------------------------------------------


async def hold(url: str, streams: int, per_s: float, tokens: int) -> tuple[list[Exchange], int]:
    """Open streams one after the other; how many were open at a time at most."""
    open_now = most = 0

    async def one(number: int) -> Exchange:
        nonlocal open_now, most
        exchange = Exchange(number)
        try:
            connection = await connect(url)
            open_now += 1
            most = max(most, open_now)
            await connection.ask(exchange, chat_request(url, number, tokens))
            open_now -= 1
            connection.close()
        except OSError as error:
            exchange.error = str(error)
        return exchange

    tasks = []
    for number in range(1, streams + 1):
        tasks.append(asyncio.create_task(one(number)))
        await asyncio.sleep(1 / per_s)
    return list(await asyncio.gather(*tasks)), most


def held_lines(folder: Path, streams: int) -> Iterable[str]:
    folder.mkdir()
    step_ms, per_s = 500.0, 100.0
    tokens = int(1000 / step_ms * (streams / per_s + 10))
    sizes = [f"engine.max_batch={streams}", f"engine.kv_tokens={streams * 128}", f"engine.emulated={step_ms}"]
    room = [f"serve.http.max_waiting={streams}", f"serve.http.max_running={streams}"]
    with Served(folder, *EMULATED, *sizes, *room) as server:
        exchanges, most = uvloop.run(hold(server.url, streams, per_s, tokens))
        memory = {name: process.memory_info().rss / 2**20 for name, process in server.processes.items()}
    wrong = [e for e in exchanges if e.error or e.status != 200 or len(e.token_stamps()) != tokens]
    yield f"## Streams held open: {streams}"
    yield ""
    yield (
        f"{streams} streams, {per_s:g} more each second, {tokens} tokens each at {1000 / step_ms:g} a second: at most "
        f"{most} were open at a time, {len(wrong)} ended with an error or without all tokens. Memory at the end: "
        + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items())
        + "."
    )
    yield ""
    for exchange in wrong[:3]:
        yield f"* {exchange.status} {exchange.error} {exchange.pieces[:1]!r:.300}"


# --- short answers a second ----------------------------------------------------------------------


def short_lines(folder: Path, repeats: int, seconds: int) -> Iterable[str]:
    folder.mkdir()
    script = folder / "short.lua"
    script.write_text(LUA)
    yield "## Short answers"
    yield ""
    yield f"`wrk -t1 -c64 -d{seconds}s`, answers of 8 tokens as JSON, steps of 1 ms. Latencies in milliseconds."
    yield ""
    yield "| requests/s | p50 | p99 | not 2xx | CPU ms per request: control | engine | frontend |"
    yield "|---|---|---|---|---|---|---|"
    sizes = ["engine.max_batch=256", "engine.kv_tokens=131072", "engine.emulated=1"]
    with Served(folder, *EMULATED, *sizes) as server:
        for _ in range(repeats):
            before = server.cpu_s()
            command = ["wrk", "-t1", "-c64", f"-d{seconds}s", "--latency", "-s", str(script)]
            said = subprocess.run(
                [*command, f"{server.url}/v1/chat/completions"], capture_output=True, text=True, check=True
            ).stdout
            after, count = server.cpu_s(), int(re.search(r"(\d+) requests in", said)[1])  # type: ignore[index]
            found = [re.search(p, said) for p in (r"Requests/sec:\s+(\S+)", r"50%\s+(\S+)", r"99%\s+(\S+)")]
            bad = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
            errors = re.search(r"Socket errors: (.*)", said)
            cells = [m[1] if m else "?" for m in found] + [
                (bad[1] if bad else "0") + (f" ({errors[1]})" if errors else "")
            ]
            cpu = [f"{1000 * (after[name] - before[name]) / count:.2f}" for name in ("control", "engine", "frontend")]
            yield f"| {' | '.join([*cells, *cpu])} |"
    yield ""


# --- all -----------------------------------------------------------------------------------------


def head() -> Iterable[str]:
    yield f"# What the front end costs, {datetime.date.today()}"
    yield ""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    yield f"`{shlex.join(['python', *sys.argv])}`"
    yield ""
    yield f"{cpu_model()}, {os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}."
    yield f"{versions}."
    yield f"Commit {git_commit()}. The engine is emulated (`engine.emulated`) where nothing else is said."
    yield f"Load of the machine before: {os.getloadavg()[0]:.2f}."
    yield ""


def main(
    out: Annotated[Path | None, typer.Option(help="Markdown file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(PARTS)}.")] = None,
    steps: Annotated[str, typer.Option(help="Step times of the engine for added, milliseconds.")] = "10,20,40",
    repeats: int = 5,
    seconds: float = 6.0,
    streams: int = 1200,
) -> None:
    allow_connections()
    times = [float(step) for step in steps.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "added": lambda: added_lines(folder, times, repeats, seconds),
            "held": lambda: held_lines(folder / "held", streams),
            "short": lambda: short_lines(folder / "short", repeats, int(seconds)),
            "freed": lambda: measure_freed(folder / "freed", repeats),
        }
        lines = list(head())
        print("\n".join(lines))
        for part in only or PARTS:
            for line in parts[part]():
                lines.append(line)
                print(line, flush=True)
    if out is not None:
        out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
