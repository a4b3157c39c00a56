"""Ten minutes of clients that stall, leave, send garbage, too much and wrong keys, beside honest ones.

    python benchmarks/http_soak.py --seconds 600 --out benchmarks/http-soak-DATE.md

At the end every honest request was answered, and nothing is left of the others: no block of the KV cache, no task and
no descriptor of front end and control process. Exits with 1 otherwise.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import platform
import random
import re
import shlex
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import checkout  # noqa: F401
import typer
from bad_clients import Crowd
from served import Served

from clif.metrics.provenance import cpu_model, git_commit

KEY, ADMIN_KEY = "honest-key-of-the-soak-" + "0" * 32, "admin-key-of-the-soak-" + "0" * 32
SIZES = ("train.enabled=false", "model.max_context=512", "engine.max_batch=64", "engine.kv_tokens=65536")
LIMITS = ("serve.http.stall_s=5", "serve.http.timeout_s=60", "serve.http.max_waiting=1000", "metrics.flush_s=0.2")
SETTLES_S = 30.0
"""Longer than the server lets a stalled client wait."""
SPARE = 3
"""Descriptors that a process may have gained, say for a file that it opens later than at the first count."""


@dataclass
class Counts:
    """What a server holds at a moment when no client is there."""

    descriptors: dict[str, int]
    memory_mib: dict[str, float]
    kv_used: int
    outstanding: int
    tasks: int


@dataclass
class Verdict:
    crowd: Crowd
    before: Counts
    after: Counts
    problems: list[str] = field(default_factory=list)


def counts(server: Served) -> Counts:
    status = json.loads((server.run_dir / "status.json").read_text())
    memory = {name: process.memory_info().rss / 2**20 for name, process in server.processes.items()}
    kv_used, outstanding = int(status["kv"]["used"]), int(status["run"]["outstanding"])
    return Counts(server.descriptors(), memory, kv_used, outstanding, tasks(server.url))


def tasks(url: str) -> int:
    """Tasks of the front end, without those of the question."""
    asking = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asking, timeout=10) as answer:
        said = re.search(rb"^clif:http_tasks (\S+)", answer.read(), re.MULTILINE)
    assert said is not None, "the front end counts its tasks"
    return int(float(said[1]))


async def crowd_for(crowd: Crowd, seconds: float, honest: int, bad: int) -> None:
    end = time.monotonic() + seconds

    async def work(choose: Any) -> None:
        while time.monotonic() < end:
            try:
                await choose()()
            except OSError as error:
                crowd.seen[f"no connection: {error}"] += 1
                await asyncio.sleep(0.1)

    honests = [work(lambda: crowd.honest) for _ in range(honest)]
    bads = [work(lambda: crowd.rng.choice(crowd.bad)) for _ in range(bad)]
    await asyncio.gather(*honests, *bads)


def soak(folder: Path, seconds: float, engine: str | None, honest: int = 8, bad: int = 24, seed: int = 0) -> Verdict:
    """engine: engine.emulated; None: the real one."""
    emulated = () if engine is None else (f"engine.emulated={engine}",)
    with Served(folder, *SIZES, *LIMITS, *emulated, keys=f"honest:{KEY},admin:{ADMIN_KEY}:admin") as server:
        crowd = Crowd(server.url, KEY, random.Random(seed))
        # Whatever is made at the first request belongs to the server.
        asyncio.run(crowd_for(crowd, min(3.0, seconds), 2, 0))
        before = settled(server, None)
        asyncio.run(crowd_for(crowd, seconds, honest, bad))
        after = settled(server, before)
    return Verdict(crowd, before, after, list(problems(crowd, before, after)))


def settled(server: Served, before: Counts | None) -> Counts:
    """The counts once they are as before, or after SETTLES_S."""
    deadline = time.monotonic() + SETTLES_S
    while True:
        time.sleep(1.0)
        now = counts(server)
        calm = not now.kv_used and not now.outstanding
        if time.monotonic() > deadline or (calm and (before is None or not list(leaks(before, now)))):
            return now


def leaks(before: Counts, after: Counts) -> Iterator[str]:
    for name, count in after.descriptors.items():
        if count > before.descriptors.get(name, 0) + SPARE:
            yield f"{name} has {count} descriptors, {before.descriptors.get(name)} before"
    if after.tasks > before.tasks:
        yield f"the front end has {after.tasks} tasks, {before.tasks} before"


def problems(crowd: Crowd, before: Counts, after: Counts) -> Iterator[str]:
    yield from crowd.failures
    yield from leaks(before, after)
    if after.kv_used:
        yield f"{after.kv_used} tokens are left in the KV cache"
    if after.outstanding:
        yield f"{after.outstanding} requests have not ended"
    if not crowd.seen["honest"]:
        yield "no honest request was answered"


def report(verdict: Verdict, seconds: float) -> Iterator[str]:
    yield f"# Clients that misbehave for {seconds:g} s, {datetime.date.today()}"
    yield ""
    yield f"`{shlex.join(['python', *sys.argv])}`"
    yield ""
    yield f"{cpu_model()}, {os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}."
    yield f"Commit {git_commit()}."
    yield ""
    yield "| what | before | after |"
    yield "|---|---|---|"
    before, after = verdict.before, verdict.after
    for name in after.descriptors:
        yield f"| descriptors of {name} | {before.descriptors.get(name)} | {after.descriptors[name]} |"
    for name, mib in after.memory_mib.items():
        yield f"| resident memory of {name}, MiB | {before.memory_mib.get(name, 0):.0f} | {mib:.0f} |"
    yield f"| tasks of the front end | {before.tasks} | {after.tasks} |"
    yield f"| tokens in the KV cache | {before.kv_used} | {after.kv_used} |"
    yield f"| requests that have not ended | {before.outstanding} | {after.outstanding} |"
    yield ""
    honest, failures = verdict.crowd.seen["honest"], len(verdict.crowd.failures)
    yield f"{honest} honest requests, {failures} failures. Answers to the others:"
    yield ""
    for what, count in sorted(verdict.crowd.seen.items()):
        yield f"* {what}: {count}"
    yield ""
    yield f"{len(verdict.problems)} problems" + (":" if verdict.problems else ".")
    for problem in verdict.problems[:20]:
        yield f"* {problem}"


def main(
    seconds: float = 600.0,
    out: Annotated[Path | None, typer.Option(help="Markdown file.")] = None,
    engine: Annotated[str, typer.Option(help="engine.emulated, or real.")] = "5",
    seed: int = 0,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        verdict = soak(Path(name), seconds, None if engine == "real" else engine, seed=seed)
    lines = "\n".join(report(verdict, seconds)).rstrip() + "\n"
    print(lines)
    if out is not None:
        out.write_text(lines)
    raise SystemExit(bool(verdict.problems))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
