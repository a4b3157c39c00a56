"""Whole runs without torchrun: by mpirun, and by Slurm's variables. configs/launch.yaml, ranks on gloo."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import warm

REPO = Path(__file__).resolve().parents[2]
LAUNCHERS = ("SLURM", "OMPI", "PMI", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
RANKS = 2


def command(run_dir: Path, *overrides: str) -> list[str]:
    place = [f"run.out_dir={run_dir.parent}", f"run.name={run_dir.name}", *overrides]
    return ["launch/run.py", "--config", "configs/launch.yaml", *place]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without any launcher's variables."""
    return {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)} | {"OMP_NUM_THREADS": "1"} | extra


def as_srun(rank: int, **extra: str) -> dict[str, str]:
    """The variables of one of two tasks on one node, under this host's own name."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": socket.gethostname(), "SLURM_NODEID": "0"}
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(RANKS), "SLURM_STEP_TASKS_PER_NODE": str(RANKS)}
    task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": str(RANKS)}
    return environment(**job, **step, **task, **extra)


def run_all(run_dir: Path, environs: list[Mapping[str, str]], *overrides: str) -> list[tuple[int, str]]:
    """(exit code, stderr) of every rank."""
    done = warm.run_all(command(run_dir, *overrides), environs, timeout=150)
    return [(rank.returncode, rank.stderr) for rank in done]


def check_that_two_replicas_trained(run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["requests"]["submitted"] == summary["requests"]["finished"]["length"] > 0
    assert summary["training"]["rounds_completed"] == 1
    assert sorted(p.name for p in run_dir.glob("rank-*.h5")) == ["rank-00000.h5", "rank-00001.h5"]


def test_ranks_that_srun_started_find_each_other_and_finish_a_round(tmp_path):
    done = run_all(tmp_path / "srun", [as_srun(rank) for rank in range(RANKS)])
    assert [code for code, _ in done] == [0, 0], done
    assert f"{RANKS} ranks, {RANKS} on this host" in done[0][1] and "Slurm step" in done[0][1]
    assert "Slurm step" not in done[1][1], "rank 0 alone says it"
    check_that_two_replicas_trained(tmp_path / "srun")


def test_a_start_in_a_job_script_without_srun_serves_alone(tmp_path):
    """The script of a job of two tasks has Slurm's variables, too; nobody else will come."""
    script = {k: v for k, v in as_srun(0).items() if not k.startswith("SLURM_STEP")}
    [(code, error)] = run_all(tmp_path / "alone", [script], "federation.min_members=1")
    assert code == 0, error[-2000:]
    assert "1 rank: single process" in error


def test_ranks_that_mpirun_started_find_each_other_and_finish_a_round(tmp_path):
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("no mpirun on this machine")
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    start = [mpirun, "-n", str(RANKS), "--oversubscribe", sys.executable, *command(tmp_path / "mpi")]
    done = subprocess.run(start, cwd=REPO, env=environment(**allowed), capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mpirun (Open MPI)" in done.stderr
    check_that_two_replicas_trained(tmp_path / "mpi")
