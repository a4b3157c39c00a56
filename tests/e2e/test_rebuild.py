"""Whole runs in which a replica fails and is rebuilt in place: the others go on, nothing is lost (promise 1)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
from launched import Launched, assert_nothing_lost_and_nothing_twice

from clif.metrics.collect import collect

# So few at a time that both replicas are needed; rounds find their slack after the load at the latest.
BOTH = ("engine.max_batch=3", "load.rate_rps=6", "federation.rounds=2", "run.linger_s=60")
FAULTY = str(Path(__file__).parents[1] / "faulty_run.py")


def went_through(run: Launched) -> Any:
    """The merged tables of a run that ended by itself, without a restart, with every request answered."""
    assert run.end() == 0, run.say()
    assert set(assert_nothing_lost_and_nothing_twice(run)) <= {"stop", "length"}
    assert not (run.run_dir / "control.r1.h5").exists(), "nobody was restarted"
    return h5py.File(collect(run.run_dir))


def returns(file: Any, replica: int) -> int:
    """How often a replica failed and came back."""
    rows = [r for r in file["transitions"][:] if r["replica"] == replica]
    pairs = [(r["from_state"], r["to_state"]) for r in rows]
    back = pairs.count((b"failed", b"serving"))
    assert sum(to == b"failed" for _, to in pairs) == back, "who failed is back"
    return back


@pytest.mark.parametrize("replica", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_an_error_in_serving_costs_the_others_nothing_and_no_request(tmp_path, replica):
    run = Launched(tmp_path, *BOTH, script=FAULTY, faults=f"{replica}:forward:60")
    with went_through(run) as file:
        assert (returns(file, replica), returns(file, 1 - replica)) == (1, 0)
        ticks = file["ticks"][:]
        assert {f"rank-{r:05d}".encode() for r in (0, 1)} == set(ticks["source"].tolist())
        requests = file["requests"][:]
        failed_s = next(r["t"] for r in file["transitions"][:] if r["to_state"] == b"failed")
        assert any(r["replica"] == replica and r["dispatched_s"] > failed_s for r in requests), "it answers again"
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["training"]["rounds_completed"] == 2, "rounds went on"
    (failure,) = summary["failures"]
    assert failure["replica"] == replica and "injected" in failure["reason"] and failure["rebuild_s"] > 0


@pytest.mark.slow
def test_a_replica_that_fails_again_and_again_ends_its_rank_in_the_end(tmp_path):
    faults = ",".join(f"1:forward:{20 + i}" for i in range(3))
    run = Launched(tmp_path, *BOTH, "run.rebuilds=2", script=FAULTY, faults=faults, restarts=0)
    assert run.end() != 0
    assert "injected into call 22 of forward" in run.log.read_text()
    assert_nothing_lost_and_nothing_twice(run)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["1:forward:40", "0:forward:40", "3:backward:4"])
def test_one_of_several_ranks_fails_and_all_of_its_replica_are_rebuilt(tmp_path, fault):
    """About 35 s each on two cores; in tests/distributed/test_supervisor.py the same without a control process."""
    run = Launched(tmp_path, *BOTH, "layout.tp_size=2", "load.duration_s=6", script=FAULTY, faults=fault, ranks=4)
    replica = int(fault[0]) // 2
    with went_through(run) as file:
        assert (returns(file, replica), returns(file, 1 - replica)) == (1, 0)
    assert run.log.read_text().count("begins incarnation 1 after") == 2


def test_a_replica_that_was_frozen_begins_anew_when_it_wakes_up(tmp_path):
    """Its requests were given to the other one: its own answers would come twice."""
    run = Launched(tmp_path, *BOTH, "control.lost_after_s=5", "load.duration_s=9", restarts=0)
    run.wait_until("clif: open:")
    time.sleep(2.0)
    run.wait_for_an_open_request()
    frozen = run.rank(1)
    frozen.suspend()
    run.wait_until("replica 1 is lost: silent")
    time.sleep(1.0)
    frozen.resume()
    with went_through(run) as file:
        assert returns(file, 1) == 1
