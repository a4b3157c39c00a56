"""Whole runs in which something is killed or told to end: nothing accepted is lost, nothing is counted twice.

Promise 1 for the requests, promise 6 for rounds and measurements.
"""

from __future__ import annotations

import json
import signal
import time

import h5py
import numpy as np
import pytest
from launched import Launched, accepted_ids, assert_nothing_lost_and_nothing_twice


def assert_answered_to_the_end(run: Launched) -> None:
    ends = assert_nothing_lost_and_nothing_twice(run)
    assert set(ends) <= {"stop", "length"}, ends
    assert not list(run.run_dir.parent.glob("run-*")), "a restart goes on in the same folder"
    assert (run.run_dir / "control.r1.h5").is_file() and (run.run_dir / "rank-00000.r1.h5").is_file()


@pytest.mark.parametrize(
    "cold", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forked", "as users start it"]
)
def test_a_rank_killed_in_the_middle_of_a_round_costs_no_request_no_round_and_no_sample(tmp_path, cold):
    # On slow cores the rounds that are left come after the load only.
    run = Launched(tmp_path, "run.linger_s=60", cold=cold)
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
    """45 to 75 s each on two cores. Rank 0 is a leader, ranks 1 and 3 are the peers of one."""
    run = Launched(tmp_path, "layout.tp_size=2", "load.duration_s=20", "load.rate_rps=4", "run.linger_s=60", ranks=4)
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
        while not any("--restarted" in p.cmdline() for p in run.controls()):
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
    ours = [line for line in run.log.read_text().splitlines() if line.startswith(("clif: ", "run folder: ", "| acc"))]
    assert ours[0] == ours[-1] == f"run folder: {run.run_dir}" and ours[-3].startswith("| accepted"), "a summary, too"
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
    ends = assert_nothing_lost_and_nothing_twice(run)
    assert set(ends) <= {"stop", "length", "cancelled", "failed"} and ends["stop"] + ends["length"], ends
    with h5py.File(run.run_dir / "run.h5") as file:
        left = [row["detail"] for row in file["requests"][:] if row["finish"] in (b"cancelled", b"failed")]
    assert all(left), "what the other replica could not end in the drain has a reason"
