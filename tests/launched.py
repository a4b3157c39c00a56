"""A run under torchrun, and what must hold of its records. Shared by the tests that kill and break things."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import psutil
import torch
import warm

from clif.adapters.store import AdapterStore
from clif.control.durability.journal import Accepted, Ended, Journal, parse
from clif.distributed.addresses import free_port
from clif.metrics.collect import collect
from clif.metrics.summary import write_summary
from clif.training.checkpoint import CheckpointWriter, find_checkpoint

REPO = Path(__file__).resolve().parents[1]
# What a busy machine keeps, too: otherwise rounds find their slack when the load is over.
PROMISED = ("slo.ttft_ms=20000", "slo.tpot_ms=2000")
# Answers of many tokens, so that a kill finds some of them half given.
LOAD = ("load.duration_s=8", "load.rate_rps=8", "load.max_tokens=100", "model.max_context=200", "run.linger_s=5")
ROUNDS = ("federation.rounds=4", "federation.local_steps=8", "quality.exact_match_rows=0", "run.max_s=150")


def latest(*overrides: str) -> list[str]:
    """Of overrides of the same field the last one: the command itself refuses one that is given twice."""
    return [f"{key}={value}" for key, value in dict(override.split("=", 1) for override in overrides).items()]


class Launched:
    """torchrun with a run of a random model under it. agents: one torchrun for each host, all of them on this one.

    script: what it starts; faults: see faulty_run.py. cold: interpreters that import everything, as users start them,
    and not forks of one that has (warm.py): four seconds of CPU more for each rank and start.
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        ranks: int = 2,
        restarts: int = 3,
        hosts: int = 1,
        script: str = "launch/run.py",
        faults: str = "",
        cold: bool = False,
    ) -> None:
        self.script, self.cold, environment = script, cold, {**os.environ, "CLIF_FAULTS": faults}
        self.run_dir, self.log = folder / "run", folder / "log.txt"
        meet = ["--nnodes", str(hosts), "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
        meet = [*meet, "--rdzv-endpoint", f"127.0.0.1:{free_port()}"] if hosts > 1 else ["--standalone"]
        place = [f"run.out_dir={folder}", "run.name=run", "run.status=plain"]
        command = [*meet, "--nproc-per-node", str(ranks), f"--max-restarts={restarts}", script]
        command += ["--config", "configs/smoke.yaml", *place, *latest(*PROMISED, *LOAD, *ROUNDS, *overrides)]
        self.log.touch()
        self.agents = [self._start(command, environment) for _ in range(hosts)]
        self.process = self.agents[0]

    def _start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes] | warm.Script:
        if not self.cold:
            return warm.Script([warm.TORCHRUN, *command], self.log, self.log, environment)
        torchrun = [sys.executable, "-P", "-m", "torch.distributed.run"]
        with self.log.open("a") as log:
            return subprocess.Popen([*torchrun, *command], cwd=REPO, stdout=log, stderr=log, env=environment)

    def wait_until(self, text: str, times: int = 1, limit_s: float = 120.0) -> None:
        end = time.monotonic() + limit_s
        while self.log.read_text().count(text) < times:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.02)

    def wait_for_an_open_request(self, limit_s: float = 30.0) -> None:
        end = time.monotonic() + limit_s
        while True:
            lines, _ = parse((self.run_dir / "journal.jsonl").read_bytes())
            ended = {line.id for line in lines if isinstance(line, Ended)}
            if any(isinstance(line, Accepted) and line.request.id not in ended for line in lines):
                return
            assert time.monotonic() < end, "the load was over before the kill: lengthen it"
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        return [p for agent in self.agents for p in psutil.Process(agent.pid).children(recursive=True)]

    def rank(self, number: int) -> psutil.Process:
        def is_it(process: psutil.Process) -> bool:
            if not self.cold:
                return process.name() == warm.rank_name(number)
            return self.script in process.cmdline() and process.environ().get("RANK") == str(number)

        return next(p for p in self.processes() if is_it(p))

    def controls(self) -> list[psutil.Process]:
        return [p for p in self.processes() if "clif.control" in p.cmdline()]

    def control(self) -> psutil.Process:
        return self.controls()[0]

    def end(self, limit_s: float = 200.0) -> int:
        codes = [agent.wait(limit_s) for agent in self.agents]
        limit = time.monotonic() + 30
        while any(str(self.run_dir) in (p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
            assert time.monotonic() < limit, "the control process outlives the run"
            time.sleep(0.1)
        return max(codes, key=abs)

    def say(self) -> str:
        return self.log.read_text()[-4000:]


def accepted_ids(run_dir: Path) -> list[int]:
    journal = Journal(run_dir)
    journal.close()
    return [line.request.id for line in journal.past if isinstance(line, Accepted)]


def assert_nothing_lost_and_nothing_twice(run: Launched) -> Counter[str]:
    """Returns how many requests ended how."""
    accepted = accepted_ids(run.run_dir)
    assert len(set(accepted)) == len(accepted), "a request was accepted twice"
    summary = write_summary(run.run_dir)
    with h5py.File(collect(run.run_dir)) as file:
        rows, load = file["requests"][:], file["load"][:]
        rounds, adapters = file["rounds"][:], file["adapters"][:]
    users = rows[rows["purpose"] == b"user"]
    assert sorted(users["id"].tolist()) == sorted(accepted), "exactly one terminal event for each accepted request"
    assert len(set(load["request"].tolist())) == len(load), "no request of the load was offered twice"
    assert summary["requests"]["unfinished"] == summary["requests"]["duplicate_ends"] == 0
    assert (summary["requests"]["submitted"], len(set(rows["id"].tolist()))) == (len(accepted), len(rows))
    committed = rounds[rounds["state"] == b"committed"]
    numbers = rounds["round_id"].tolist()
    assert len(set(numbers)) == len(numbers), "a round has one row, and no number is given twice"
    assert sorted(committed["round_id"].tolist()) == sorted(AdapterStore(run.run_dir).rounds())
    assert sorted(adapters["version"].tolist()) == sorted(committed["version"].tolist())
    samples, steps = committed_training(run.run_dir)
    assert samples == int(committed["samples"].sum()), "samples count once, when committed"
    assert steps == int(committed["steps"].sum()), "the optimizer goes on from the last committed round"
    return Counter(finish.decode() for finish in users["finish"].tolist())


def committed_training(run_dir: Path) -> tuple[int, int]:
    """Samples and optimizer steps of all replicas, as a resumed run would find them; all ranks of a replica agree."""
    rounds, cpu = AdapterStore(run_dir).rounds(), torch.device("cpu")
    folder = run_dir / "checkpoints"
    tp_size = json.loads((run_dir / "config.json").read_text())["layout"]["tp_size"]
    replicas: dict[int, list[tuple[int, int]]] = {}
    for rank in sorted({int(path.name[5:10]) for path in folder.glob("rank-*")}):
        found = find_checkpoint(CheckpointWriter(folder, rank), rounds, cpu)
        if found is not None:
            # Of the moments themselves: fresh ones would count from 0.
            steps = int(found.trainer["moments"].get("step", 0))
            replicas.setdefault(rank // tp_size, []).append((found.cursor["committed"], steps))
    assert all(len(ranks) == tp_size and len(set(ranks)) == 1 for ranks in replicas.values()), replicas
    return sum(ranks[0][0] for ranks in replicas.values()), sum(ranks[0][1] for ranks in replicas.values())
