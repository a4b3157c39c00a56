"""Whole runs in which something is killed or told to end: nothing accepted is lost, nothing is counted twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch

from clif.addresses import free_port
from clif.control.journal import Accepted, Ended, Journal, parse
from clif.metrics.collect import collect
from clif.metrics.summary import write_summary
from clif.replica.checkpoint import CheckpointWriter, find_checkpoint
from clif.store import AdapterStore

REPO = Path(__file__).resolve().parents[2]
# Answers of many tokens, so that a kill finds some of them half given.
LOAD = ("load.duration_s=12", "load.rate_rps=8", "load.max_tokens=100", "model.max_context=200", "run.linger_s=5")
ROUNDS = ("federation.rounds=4", "federation.local_steps=8", "quality.exact_match_rows=0", "run.max_s=150")


class Launched:
    """torchrun with a run of a random model under it. agents: one torchrun for each host, all of them on this one."""

    def __init__(self, folder: Path, *overrides: str, ranks: int = 2, restarts: int = 3, hosts: int = 1) -> None:
        self.run_dir, self.log = folder / "run", folder / "log.txt"
        meet = ["--nnodes", str(hosts), "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
        meet = [*meet, "--rdzv-endpoint", f"127.0.0.1:{free_port()}"] if hosts > 1 else ["--standalone"]
        torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", *meet, "--nproc-per-node", str(ranks)]
        place = [f"run.out_dir={folder}", "run.name=run", "run.status=plain"]
        command = [*torchrun, f"--max-restarts={restarts}", "launch/run.py", "--config", "configs/smoke.yaml"]
        command += [*place, *LOAD, *ROUNDS, *overrides]
        with self.log.open("a") as log:
            self.agents = [subprocess.Popen(command, cwd=REPO, stdout=log, stderr=log) for _ in range(hosts)]
        self.process = self.agents[0]

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
        trees = [psutil.Process(agent.pid).children(recursive=True) for agent in self.agents]
        return [p for tree in trees for p in tree if what in p.cmdline()]

    def rank(self, number: int) -> psutil.Process:
        return next(p for p in self.processes("launch/run.py") if p.environ().get("RANK") == str(number))

    def control(self) -> psutil.Process:
        return self.processes("clif.control")[0]

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
            steps = int(found.trainer["moments"]["step"])
            replicas.setdefault(rank // tp_size, []).append((found.cursor["committed"], steps))
    assert all(len(ranks) == tp_size and len(set(ranks)) == 1 for ranks in replicas.values()), replicas
    return sum(ranks[0][0] for ranks in replicas.values()), sum(ranks[0][1] for ranks in replicas.values())


def assert_answered_to_the_end(run: Launched) -> None:
    ends = assert_nothing_lost_and_nothing_twice(run)
    assert set(ends) <= {"stop", "length"}, ends
    assert not list(run.run_dir.parent.glob("run-*")), "a restart goes on in the same folder"
    assert (run.run_dir / "control.r1.h5").is_file() and (run.run_dir / "rank-00000.r1.h5").is_file()


def test_a_rank_killed_in_the_middle_of_a_round_costs_no_request_no_round_and_no_sample(tmp_path):
    run = Launched(tmp_path, "load.duration_s=20")
    run.wait_until("round 2:")
    time.sleep(0.3)
    run.wait_for_an_open_request()
    run.rank(1).send_signal(signal.SIGKILL)
    assert run.end() == 0, run.say()
    assert_answered_to_the_end(run)
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["training"]["rounds_completed"] >= 4, "rounds of before the kill count"
    with h5py.File(run.run_dir / "run.h5") as file:
        late, load = file["requests"][:], file["load"][:]
    late = late[late["source"] == b"control.r1"]
    open_then = late[np.isin(late["id"], load[load["source"] == b"control"]["request"])]
    assert len(open_then) and (open_then["arrival_s"] < 0).all(), (
        "latencies of requests that were open count from before the kill"
    )
    assert all(row["version"] >= 1 for row in late if row["purpose"] == b"user")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 0", "rank 1", "rank 3"])
def test_a_rank_of_a_replica_of_two_killed_costs_nothing_either(tmp_path, victim):
    """About 45 s each on two cores. Rank 0 is a leader, ranks 1 and 3 are the peers of one."""
    run = Launched(tmp_path, "layout.tp_size=2", "load.duration_s=20", "load.rate_rps=4", ranks=4)
    run.wait_until("round 2:")
    time.sleep(0.3)
    run.wait_for_an_open_request()
    run.rank(int(victim[-1])).send_signal(signal.SIGKILL)
    assert run.end() == 0, run.say()
    assert_answered_to_the_end(run)
    assert sorted(p.name for p in run.run_dir.glob("rank-*.r1.h5")) == [f"rank-{r:05d}.r1.h5" for r in range(4)]
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["training"]["rounds_completed"] >= 4, "rounds of before the kill count"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 0", "rank 3"])
def test_a_rank_killed_on_either_of_two_hosts_costs_nothing_either(tmp_path, victim):
    """About 50 s each on two cores. Two torchruns that meet as those of two hosts would; rank 3 is the second one's."""
    run = Launched(tmp_path, "load.duration_s=20", "load.rate_rps=4", ranks=2, hosts=2)
    run.wait_until("round 2:")
    time.sleep(0.3)
    run.rank(int(victim[-1])).send_signal(signal.SIGKILL)
    assert run.end() == 0, run.say()
    assert_answered_to_the_end(run)


@pytest.mark.slow
def test_when_a_host_has_no_restart_left_its_next_loss_ends_every_request(tmp_path):
    """About 40 s on two cores. The other host's torchrun counts for itself and may have one left."""
    run = Launched(tmp_path, "load.duration_s=20", "load.rate_rps=4", ranks=2, hosts=2, restarts=1)
    for start in (1, 2):
        run.wait_until("clif: open:", times=start)
        run.wait_until("train (pressure", times=run.log.read_text().count("train (pressure") + 1)
        run.rank(3).send_signal(signal.SIGKILL)
    assert run.end() != 0
    assert_nothing_lost_and_nothing_twice(run)


def test_the_control_process_killed_costs_nothing_either(tmp_path):
    run = Launched(tmp_path)
    run.wait_until("round 2:")
    time.sleep(0.3)
    run.control().send_signal(signal.SIGKILL)
    assert run.end() == 0, run.say()
    assert_answered_to_the_end(run)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [("rank 0",), ("rank 3", "control", "rank 0")])
def test_one_kill_after_the_other_costs_nothing(tmp_path, victims):
    run = Launched(tmp_path, "federation.rounds=6", "load.duration_s=20", ranks=4)
    for number, victim in enumerate(victims, start=1):
        # A round of the latest start.
        run.wait_until("clif: open:", times=number)
        seen = run.log.read_text().count("train (pressure")
        run.wait_until("train (pressure", times=seen + 1)
        time.sleep(0.1 * number)
        process = run.control() if victim == "control" else run.rank(int(victim[-1]))
        process.send_signal(signal.SIGKILL)
    assert run.end() == 0, run.say()
    assert_answered_to_the_end(run)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 1", "rank 0", "control"])
def test_a_kill_while_the_ranks_load_again_costs_nothing(tmp_path, victim):
    run = Launched(tmp_path)
    run.wait_until("round 2:")
    run.rank(1).send_signal(signal.SIGKILL)
    run.wait_until("restarted by the launcher")
    if victim == "control":
        end = time.monotonic() + 60
        while not any("--restarted" in p.cmdline() for p in run.processes("clif.control")):
            assert time.monotonic() < end
            time.sleep(0.01)
    process = run.control() if victim == "control" else run.rank(int(victim[-1]))
    process.send_signal(signal.SIGKILL)
    assert run.end() == 0, run.say()
    assert_answered_to_the_end(run)


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.15, 0.4, 0.8])
def test_whenever_the_kill_comes_samples_and_rounds_stay_consistent(tmp_path, delay_s):
    """Rounds of one step follow each other closely, so that the kill falls into votes and commits as well."""
    run = Launched(tmp_path, "federation.local_steps=1", "federation.rounds=12", "control.hold_s=0.1")
    run.wait_until("committed", times=2)
    time.sleep(delay_s)
    run.rank(1).send_signal(signal.SIGKILL)
    assert run.end() == 0, run.say()
    assert_answered_to_the_end(run)


def test_sigterm_lets_running_requests_end_and_the_run_goes_on_later(tmp_path):
    run = Launched(tmp_path)
    run.wait_until("round 1 committed")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() != 0
    assert "drain: " in run.log.read_text() and "clif: drained: " in run.log.read_text()
    ends = assert_nothing_lost_and_nothing_twice(run)
    assert set(ends) <= {"stop", "length"}, "what ran had time enough"
    before = accepted_ids(run.run_dir)
    again = Launched(tmp_path, "run.resume=true")
    assert again.end() == 0, again.say()
    assert_answered_to_the_end(again)
    after = accepted_ids(run.run_dir)
    assert after[: len(before)] == before and len(after) > len(before), "the load went on where it was"
    assert after == list(range(len(after)))


def test_what_does_not_end_in_time_is_cancelled_with_the_reason(tmp_path):
    run = Launched(tmp_path, "run.drain_s=0", "load.rate_rps=60")
    run.wait_until("clif: open:")
    time.sleep(2.0)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() != 0
    ends = assert_nothing_lost_and_nothing_twice(run)
    assert ends["cancelled"] and set(ends) <= {"stop", "length", "cancelled"}, ends
    with h5py.File(run.run_dir / "run.h5") as file:
        rows = file["requests"][:]
    details = {row["detail"].decode() for row in rows if row["finish"] == b"cancelled"}
    assert all("SIGTERM" in detail for detail in details)
    files = [f"{stem}.h5" for stem in ("control", "rank-00000", "rank-00001")]
    for name in files:
        with h5py.File(run.run_dir / name) as file:
            assert file.attrs["end_s"] > 0, f"{name} was closed"


def test_without_restarts_left_a_lost_rank_still_ends_every_request(tmp_path):
    run = Launched(tmp_path, restarts=0)
    run.wait_until("round 1:")
    time.sleep(0.5)
    run.rank(1).send_signal(signal.SIGKILL)
    assert run.end() != 0
    assert_nothing_lost_and_nothing_twice(run)
