"""Latency on a CPU under the same arrivals: `clif serve` against the servers of vLLM and llama.cpp, all over HTTP.

    python benchmarks/latency_peers.py --model assets/smollm2-135m-instruct.gguf --ranks 2 \\
        --peer vllm=/path/to/venv/bin/python --peer llama=/path/to/llama-server

Open loop: requests come at random moments whatever the server does. In a repeat all servers get the same requests at
the same moments, in the next one others. One server computes at a time; the others are idle. Servers and client share
the cores.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import checkout  # noqa: F401
import numpy as np
import rival_engines
import typer
import uvloop
from engine import REPO, cpu_flags
from lean_client import Exchange, chat_request, connect
from peer_files import make_files
from peer_server import MODEL, PeerServer, known_servers
from served import Served
from turns import spread

from clif.metrics.provenance import cpu_model, git_commit

FIGURES = ("ttft", "gap", "end to end")
QUANTILES = (50, 99)
WORDS = (
    "turn set open close dim start stop the a my light lamp door window fan radio kitchen hall garden room to at on off"
)


@dataclass(frozen=True)
class Arrivals:
    """Of a repeat: when requests come, seconds after its start, and what they ask."""

    at: tuple[float, ...]
    texts: tuple[str, ...]


def arrivals(repeat: int, rate: float, seconds: float, words: int) -> Arrivals:
    """A Poisson process, and questions that no other repeat has."""
    rng, at, now = random.Random(f"arrivals of repeat {repeat}"), [], 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        at.append(now)
    return Arrivals(tuple(at), tuple(" ".join(rng.choices(WORDS.split(), k=words)) for _ in at))


async def ask_all(url: str, load: Arrivals, answer: int) -> list[Exchange]:
    """Every request at its moment, on a connection of its own; returns when all have ended."""
    loop = asyncio.get_running_loop()
    begin = loop.time() + 0.1

    async def one(number: int, at: float, text: str) -> Exchange:
        exchange = Exchange(number)
        await asyncio.sleep(max(0.0, begin + at - loop.time()))
        try:
            connection = await connect(url)
        except OSError as error:
            exchange.error = str(error)
            return exchange
        # A client that is late would hide what the server made it wait.
        messages = [{"role": "user", "content": text}]
        await connection.ask(exchange, chat_request(url, number, answer, MODEL, messages=messages))
        connection.close()
        return exchange

    tasks = [one(i, at, text) for i, (at, text) in enumerate(zip(load.at, load.texts, strict=True))]
    return list(await asyncio.gather(*tasks))


@dataclass(frozen=True)
class Latency:
    """Of one repeat: milliseconds by figure and quantile; requests, and those without a whole answer."""

    ms: dict[tuple[str, int], float]
    requests: int
    wrong: int


def latency_of(exchanges: Sequence[Exchange]) -> Latency:
    """TTFT: to the first text; gap: between two events with text; end to end: to the last text."""
    found: dict[str, list[float]] = {name: [] for name in FIGURES}
    wrong = 0
    for exchange in exchanges:
        stamps = [] if exchange.error or exchange.status != 200 else exchange.token_stamps()
        if len(stamps) < 2:
            wrong += 1
            continue
        found["ttft"].append(stamps[0] - exchange.sent_s)
        found["gap"] += np.diff(stamps).tolist()
        found["end to end"].append(stamps[-1] - exchange.sent_s)
    ms = {(n, q): 1000 * float(np.percentile(found[n] or [np.nan], q)) for n in FIGURES for q in QUANTILES}
    return Latency(ms, len(exchanges), wrong)


@dataclass
class Entrant:
    """A server and its repeats. peer: None for CLIF, which idles by itself."""

    name: str
    url: str
    settings: str
    peer: PeerServer | None = None
    repeats: list[Latency] = field(default_factory=list)

    def take_turn(self, load: Arrivals, answer: int) -> Latency:
        if self.peer is None:
            return latency_of(uvloop.run(ask_all(self.url, load, answer)))
        self.peer.wake()
        try:
            return latency_of(uvloop.run(ask_all(self.url, load, answer)))
        finally:
            self.peer.rest()


def table(entrants: Sequence[Entrant]) -> list[str]:
    """Markdown: medians of the repeats with the least and the most, and CLIF's p99 over each peer's."""
    heads = [f"{name} p{q}, ms" for name in FIGURES for q in QUANTILES]
    lines = [f"| server | {' | '.join(heads)} | requests, without answer |", "|" + "---|" * (len(heads) + 2)]
    for one in entrants:
        cells = [spread([r.ms[name, q] for r in one.repeats], 0) for name in FIGURES for q in QUANTILES]
        counts = f"{sum(r.requests for r in one.repeats)}, {sum(r.wrong for r in one.repeats)}"
        lines.append(f"| {one.name} | {' | '.join(cells)} | {counts} |")
    ours = entrants[0]
    lines += ["", f"{ours.name}'s figure over the other's, in a repeat:", ""]
    lines += [f"| server | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for one in entrants[1:]:
        both = list(zip(ours.repeats, one.repeats, strict=True))
        cells = [spread([o.ms[n, q] / t.ms[n, q] for o, t in both], 2) for n in FIGURES for q in QUANTILES]
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return [*lines, "", *[f"* {one.name}: {one.settings}" for one in entrants], ""]


def measure(entrants: Sequence[Entrant], repeats: int, rate: float, seconds: float, answer: int, words: int) -> None:
    """A short warm-up of each, then all repeats: A B C, then C B A."""
    for one in entrants:
        one.take_turn(arrivals(0, rate, min(4.0, seconds), words), answer)
    for number in range(1, repeats + 1):
        load = arrivals(number, rate, seconds, words)
        for one in entrants if number % 2 else reversed(entrants):
            one.repeats.append(one.take_turn(load, answer))
            median = statistics.median(one.repeats[-1].ms[name, 50] for name in FIGURES[:1])
            print(f"repeat {number}, {one.name}: TTFT p50 {median:.0f} ms", file=sys.stderr, flush=True)


def main(
    model: Annotated[str, typer.Option(help="a GGUF file")] = str(REPO / "assets" / "smollm2-135m-instruct.gguf"),
    peer: Annotated[list[str] | None, typer.Option(help="vllm=PYTHON or llama=llama-server")] = None,
    out: Annotated[Path, typer.Option(help="folder for the dated file")] = REPO / "benchmarks",
    files: Annotated[Path, typer.Option(help="folder of converted weights")] = REPO / "runs" / "peer-files",
    ranks: Annotated[int, typer.Option(min=1, help="CLIF's replicas, which share the cores")] = 2,
    rate: Annotated[float, typer.Option(min=0.1, help="requests per second")] = 6.0,
    seconds: Annotated[float, typer.Option(min=1, help="of arrivals in a repeat")] = 20.0,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    answer: Annotated[int, typer.Option(min=2, help="tokens per answer")] = 64,
    words: Annotated[int, typer.Option(min=1, help="per question; the chat template adds to them")] = 12,
    streams: Annotated[int, typer.Option(min=1, help="requests that each server may compute at once")] = 32,
) -> None:
    """Compare latency over HTTP and write a dated file."""
    busy, cores = os.getloadavg()[0], tuple(sorted(os.sched_getaffinity(0)))
    made = make_files(Path(model), files, 0)
    servers = known_servers(rival_engines.parse(peer or ()), made, cores, streams)
    sizes = ["model.max_context=512", "model.dtype=bfloat16", f"engine.max_batch={streams}", "engine.kv_tokens=16384"]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clif = stack.enter_context(Served(folder, *sizes, model=made.model, ranks=ranks))
        entrants = [Entrant("CLIF", clif.url, f"`clif serve --ranks {ranks}`, {', '.join(sizes)}")]
        for server in servers:
            server.start()
            stack.callback(server.stop)
            server.rest()
            entrants.append(Entrant(server.name, server.url, server.settings, server))
        measure(entrants, repeats, rate, seconds, answer, words)
    today = datetime.date.today().isoformat()
    head = [
        f"# Latency over HTTP, {today}",
        "",
        f"* command: `python {shlex.join(sys.argv)}`",
        f"* machine: {cpu_model()} ({cpu_flags()}), {len(cores)} cores; load average before {busy:.2f}",
        f"* Python {platform.python_version()}, commit {git_commit() or 'unknown'}",
        f"* {repeats} repeats of {seconds:g} s with {rate:g} requests/s at random moments, the same for all servers in "
        f"a repeat; {words} words and the chat template, {answer} tokens per answer; median (least to most)",
        "",
    ]
    path = out / f"latency-peers-{today}.md"
    path.write_text("\n".join([*head, *table(entrants)]))
    print(path.read_text())


if __name__ == "__main__":
    typer.run(main)
