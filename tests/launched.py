"""A run under torchrun, and what must hold of its records. Shared by the tests that kill and break things."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import psutil
import torch

from clif.control.journal import Accepted, Ended, Journal, parse
from clif.metrics.collect import collect
from clif.metrics.summary import write_summary
from clif.replica.checkpoint import CheckpointWriter, find_checkpoint
from clif.store import AdapterStore

REPO = Path(__file__).resolve().parents[1]
# Answers of many tokens, so that a kill finds some of them half given.
LOAD = ("load.duration_s=12", "load.rate_rps=8", "load.max_tokens=100", "model.max_context=200", "run.linger_s=5")
ROUNDS = ("federation.rounds=4", "federation.local_steps=8", "quality.exact_match_rows=0", "run.max_s=150")


class Launched:
    """torchrun with a run of a random model under it. script: what it starts; faults: see faulty_run.py."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        ranks: int = 2,
        restarts: int = 3,
        script: str = "launch/run.py",
        faults: str = "",
    ) -> None:
        self.script = script
        self.run_dir, self.log = folder / "run", folder / "log.txt"
        torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        place = [f"run.out_dir={folder}", "run.name=run", "run.status=plain"]
        command = [*torchrun, f"--max-restarts={restarts}", script, "--config", "configs/smoke.yaml"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *place, *LOAD, *ROUNDS, *overrides],
                cwd=REPO,
                stdout=log,
                stderr=log,
                text=True,
                env={**os.environ, "CLIF_FAULTS": faults},
            )

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

    def processes(self, what: str) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if what in p.cmdline()]

    def rank(self, number: int) -> psutil.Process:
        return next(p for p in self.processes(self.script) if p.environ().get("RANK") == str(number))

    def control(self) -> psutil.Process:
        return self.processes("clif.control")[0]

    def end(self, limit_s: float = 200.0) -> int:
        code = self.process.wait(limit_s)
        limit = time.monotonic() + 30
        while any(str(self.run_dir) in (p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])):
            assert time.monotonic() < limit, "the control process outlives the run"
            time.sleep(0.1)
        return code

    def say(self) -> str:
        return self.log.read_text()[-4000:]


def accepted_ids(run_dir: Path) -> list[int]:
    journal = Journal(run_dir)
    journal.close()
    return [line.request.id for line in journal.past if isinstance(line, Accepted)]


def assert_nothing_lost_and_nothing_twice(run: Launched, tp_size: int = 1) -> Counter[str]:
    """Returns how many requests ended how. tp_size: ranks of each replica."""
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
    assert committed_samples(run.run_dir, tp_size) == int(committed["samples"].sum()), (
        "samples count once, when committed"
    )
    return Counter(finish.decode() for finish in users["finish"].tolist())


def committed_samples(run_dir: Path, tp_size: int) -> int:
    """Samples that the cursors of all replicas count as committed, as a resumed run would find them."""
    rounds, cpu = AdapterStore(run_dir).rounds(), torch.device("cpu")
    folder = run_dir / "checkpoints"
    ranks = {int(path.name[5:10]) for path in folder.glob("rank-*")}
    found = [find_checkpoint(CheckpointWriter(folder, rank), rounds, cpu) for rank in sorted(ranks)]
    counts = [0 if c is None else c.cursor["committed"] for c in found]
    assert all(len(set(counts[i : i + tp_size])) == 1 for i in range(0, len(counts), tp_size)), (
        "a replica's ranks agree"
    )
    return sum(counts[::tp_size])
