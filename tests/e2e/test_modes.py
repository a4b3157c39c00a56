"""The baselines of run.mode as whole runs: torchrun, gloo, a random model, byte tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import warm
from launched import PROMISED

SHORT = (*PROMISED, "federation.rounds=1", "load.duration_s=3")


def run(folder: Path, ranks: int, *overrides: str) -> dict[str, Any]:
    """Run configs/smoke.yaml to its end; returns the tables of its run.h5."""
    command = [warm.TORCHRUN, "--standalone", "--nproc-per-node", str(ranks), "launch/run.py"]
    command += ["--config", "configs/smoke.yaml", f"run.out_dir={folder}", "run.name=run", "run.status=plain"]
    done = warm.run([*command, *overrides], timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    with h5py.File(folder / "run" / "run.h5") as file:
        return {name: data[:] for name, data in file.items() if isinstance(data, h5py.Dataset)}


def test_split_trains_on_one_replica_and_serves_its_adapter_on_the_other(tmp_path):
    tables = run(tmp_path, 2, "run.mode=split", *SHORT)
    assert {r["replica"] for r in tables["requests"]} == {0}, "probes of quality included"
    assert [(r["members"], r["state"]) for r in tables["rounds"]] == [(b"1", b"committed")]
    assert {r["rank"] for r in tables["train_steps"]} == {1}
    # The closing measurement waits until the server has installed what the trainer learnt.
    assert {q["phase"]: q["version"] for q in tables["quality"]} == {b"before": 0, b"after": 1}
    assert max(r["version"] for r in tables["requests"]) == 1
    states = {(t["replica"], t["to_state"]) for t in tables["transitions"]}
    assert states == {(0, b"serving"), (1, b"serving"), (1, b"idle"), (1, b"combined")}


def test_time_slice_serves_and_trains_on_the_same_replica(tmp_path):
    tables = run(tmp_path, 1, "run.mode=time_slice", "run.training_share=0.5", *SHORT)
    assert {r["finish"] for r in tables["requests"]} <= {b"length", b"stop"}
    assert len(tables["load"]) == sum(r["purpose"] == b"user" for r in tables["requests"])
    (ended,) = tables["rounds"]
    assert (ended["members"], ended["state"]) == (b"0", b"committed")
    assert b"run.mode time_slice" in next(t["reason"] for t in tables["transitions"] if t["to_state"] == b"idle")
    assert not len(tables["batches"]), "the coordinator leaves the sizes alone"


def test_train_only_makes_round_after_round_without_load(tmp_path):
    tables = run(tmp_path, 1, "run.mode=train_only", "load.kind=none", "federation.rounds=null", "run.linger_s=3")
    assert not len(tables["load"]) and len(tables["rounds"]) >= 1
    assert set(tables["train_steps"]["round_id"]) <= set(tables["rounds"]["round_id"])
