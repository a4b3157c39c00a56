"""Kill parts of a server while many streams are open and two jobs train; then account for every stream and sample.

    python benchmarks/http_kills.py [--streams 200] [--kills 4] [--seconds 6] [--out benchmarks/http-kills-DATE.md]

Two replicas under torchrun --max-restarts. In turn a rank, the front end, the control process and rank 0 are killed by
SIGKILL. Each stream must end with a finish reason, with an error event, or as a broken connection whose request the
journal ends with a reason. At the end the samples of both jobs' committed rounds are counted twice, from the store of
jobs and from the table `rounds`, and must be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import httpx
import psutil

from clif import __version__
from clif.adapters.store import AdapterStore
from clif.jobs.store import JobStore
from clif.types import of_client

REPO = Path(__file__).resolve().parents[1]
TARGETS = ("a rank", "the front end", "the control process", "rank 0")
MODEL = "random:configs/models/tiny-llama.json"
WAIT_S = 240.0
WORDS = re.findall(r"\w+", "lamp light door window heat cool open close red green blue warm cold left right up down")


@dataclass
class Outcome:
    """How a stream ended. request_id: None if it ended before its answer began."""

    kind: str
    request_id: int | None = None
    detail: str = ""


@dataclass
class Server:
    """torchrun with the two ranks, and the processes below it."""

    folder: Path
    url: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def start(self, kills: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [f"--max-restarts={kills + 2}", "-m", "clif.run", "--config", "serve", f"model.path={MODEL}"]
        command += [f"run.out_dir={self.folder}", "run.name=run", "run.status=plain", f"serve.http.port={port}"]
        command += ["layout.replicas=2", "model.dtype=float32", "model.max_context=256", "engine.max_batch=64"]
        command += ["engine.kv_tokens=16384", "federation.local_steps=6", "control.hold_s=0.2", "run.drain_s=5"]
        command += ["federation.tolerance=1.0", "serve.http.max_waiting=1000", "slo.ttft_ms=20000"]
        log = (self.folder / "log.txt").open("wb")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log, env=environment)
        self.wait_ready()

    def wait_ready(self) -> float:
        """Seconds until requests are accepted."""
        began = time.monotonic()
        while time.monotonic() - began < WAIT_S:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return time.monotonic() - began
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise SystemExit(f"the server is not ready:\n{(self.folder / 'log.txt').read_text()[-3000:]}")

    def kill(self, target: str) -> None:
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children(recursive=True):
            words = child.cmdline()
            found = {
                "a rank": "clif.run" in words and child.environ().get("RANK") == "1",
                "rank 0": "clif.run" in words and child.environ().get("RANK") == "0",
                "the front end": "clif.frontend" in words,
                "the control process": "clif.control" in words,
            }
            if found[target]:
                child.kill()
                return
        raise SystemExit(f"{target} is not there")

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


async def stream(client: httpx.AsyncClient, url: str, number: int) -> Outcome:
    """Read one stream to its end, whatever ends it."""
    body = {
        "model": "clif",
        "messages": [{"role": "user", "content": f"{random.choice(WORDS)} {number}"}],
        "max_tokens": 160,
        "ignore_eos": True,
        "stream": True,
    }
    request_id, finished = None, ""
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                problem = json.loads(await answer.aread())["error"]["message"]
                return Outcome(f"refused with {answer.status_code}", None, problem)
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    return Outcome("whole" if finished else "ended without a reason", request_id)
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Outcome("error event", request_id, event["error"]["message"])
                request_id = int(event["id"].rsplit("-", 1)[1], 16)
                finished = finished or (event["choices"][0]["finish_reason"] if event["choices"] else "") or ""
        return Outcome("broken connection", request_id)
    except (httpx.HTTPError, ValueError) as error:
        return Outcome("broken connection", request_id, type(error).__name__)


async def streams_through(server: Server, target: str, streams: int, seconds: float) -> list[Outcome]:
    """Open the streams, kill the target in their middle, and wait for the end of all."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=WAIT_S, limits=limits) as client:
        tasks = [asyncio.create_task(stream(client, server.url, number)) for number in range(streams)]
        await asyncio.sleep(seconds)
        open_ = sum(not task.done() for task in tasks)
        server.kill(target)
        outcomes = await asyncio.gather(*tasks)
    print(f"{target}: {open_} of {streams} streams open at the kill")
    return outcomes


def make_jobs(url: str) -> list[str]:
    """Two jobs, each with an adapter of its own, that do not end before the server does."""
    ids = []
    for name in ("north", "south"):
        rows = [{"prompt": f"{name} {a} {b}", "completion": f"{b} {a}"} for a in WORDS for b in WORDS[:8]]
        content = "\n".join(map(json.dumps, rows)).encode()
        files = {"file": (f"{name}.jsonl", content), "purpose": (None, "fine-tune")}
        uploaded = checked(httpx.post(f"{url}/v1/files", files=files, timeout=WAIT_S))
        body = {
            "model": "base",
            "training_file": uploaded["id"],
            "suffix": name,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50}}},
        }
        ids.append(checked(httpx.post(f"{url}/v1/fine_tuning/jobs", json=body, timeout=WAIT_S))["id"])
    return ids


def checked(answer: httpx.Response) -> Any:
    if answer.status_code != 200:
        raise SystemExit(f"{answer.request.url}: {answer.status_code} {answer.text}")
    return answer.json()


def explained(run_dir: Path, outcomes: list[Outcome]) -> list[str]:
    """What is wrong with the streams, judged by the journal. Every accepted request of a client has one end there."""
    accepted: Counter[int] = Counter()
    ended: dict[int, list[str]] = {}
    for line in (run_dir / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["type"] == "Accepted" and of_client(entry["request"]["id"]):
            accepted[entry["request"]["id"]] += 1
        if entry["type"] == "Ended" and of_client(entry["id"]):
            ended.setdefault(entry["id"], []).append(f"{entry['finish']}: {entry['detail']}")
    wrong = [f"request {i} has {len(ended.get(i, []))} ends" for i in accepted if len(ended.get(i, [])) != 1]
    wrong += [f"request {i} was accepted {n} times" for i, n in accepted.items() if n != 1]
    for outcome in outcomes:
        if outcome.kind == "ended without a reason":
            wrong.append(f"the stream of request {outcome.request_id} has no finish reason")
        if outcome.kind == "broken connection" and outcome.request_id is not None and outcome.request_id not in ended:
            wrong.append(f"the connection of request {outcome.request_id} broke, and the journal has no reason")
    return wrong


def samples_of(run_dir: Path, jobs: list[str]) -> tuple[list[str], list[str]]:
    """(lines of the report, what is wrong): samples of committed rounds by the store of jobs and by the tables."""
    store, lines, wrong = JobStore(run_dir), [], []
    committed = {v.round_id: v.job for v in AdapterStore(run_dir).committed()}
    with h5py.File(run_dir / "run.h5") as file:
        rows = file["rounds"][:]
    tables: Counter[str] = Counter()
    for row in rows:
        if row["state"] == b"committed":
            tables[committed.get(int(row["round_id"]), "unknown")] += int(row["samples"])
    for job in jobs:
        counted = sum(done.samples for done in store.rounds(job, committed=True))
        state = store.get_job(job)
        lines.append(f"{job}: {state.status}, {state.completed} rounds, {counted} samples in the store")
        if not counted == state.counted == tables[job]:
            wrong.append(f"{job}: {counted} samples by its rounds, {state.counted} counted, {tables[job]} in the table")
    store.close()
    repeated = [i for i, n in Counter(int(r["round_id"]) for r in rows).items() if n > 1]
    return lines, wrong + [f"round {i} has several rows" for i in repeated]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--kills", type=int, default=len(TARGETS))
    parser.add_argument("--seconds", type=float, default=1.5, help="from the opening of the streams to the kill")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start(arguments.kills)
        jobs, outcomes, table = make_jobs(server.url), [], []
        for number in range(arguments.kills):
            target = TARGETS[number % len(TARGETS)]
            found = asyncio.run(streams_through(server, target, arguments.streams, arguments.seconds))
            back_s = server.wait_ready()
            outcomes += found
            kinds = Counter(outcome.kind for outcome in found)
            table.append(f"| {target} | {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())} | {back_s:.1f} |")
            print(table[-1])
        server.stop()
        lines, wrong = samples_of(server.run_dir, jobs)
        wrong += explained(server.run_dir, outcomes)
        details = Counter(outcome.detail for outcome in outcomes if outcome.detail)
        if wrong:
            print((server.folder / "log.txt").read_text()[-6000:])
    report = [
        f"# Kills during {arguments.streams} open streams and two jobs, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python benchmarks/http_kills.py {' '.join(sys.argv[1:])}`, clif {__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} CPUs of {platform.processor() or platform.machine()}",
        "",
        "| killed | streams | accepts again after, s |",
        "|---|---|---|",
        *table,
        "",
        *(f"* {n} times: {detail}" for detail, n in details.most_common()),
        "",
        *(f"* {line}" for line in lines),
        "",
        f"Unexplained: {len(wrong)}.",
        *(f"* {line}" for line in wrong[:50]),
    ]
    print("\n".join(report))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(report) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
