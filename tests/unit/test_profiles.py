"""The configurations that come with CLIF do what their comments say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clif.config import Config, load_config
from clif.control.policy.phases import Facts, Phase, next_phase, rounds_may_start
from clif.control.policy.pressure import Pressure
from clif.control.policy.round_admission import History, plan_round
from clif.control.policy.view import ClusterView, ReplicaView
from clif.data.check import check_inputs
from clif.data.load import read_arrivals
from clif.distributed.layout import make_layout
from clif.states import ReplicaState

REPO = Path(__file__).resolve().parents[2]
GPU_PROFILES = ["gpu1", "gpu8", "gpu8_tp2", "nodes2_70b"]
SMALL = ("model.path=random:configs/models/tiny-llama.json", "model.device=cpu", "model.dtype=float32")


@pytest.fixture(params=GPU_PROFILES)
def profile(request, monkeypatch) -> Config:
    """A profile for GPUs, with another model and device."""
    monkeypatch.chdir(REPO)
    return load_config(REPO / "configs" / f"{request.param}.yaml", SMALL)


def test_profiles_for_gpus_serve_poisson_load_for_an_hour(profile):
    load = profile.load
    times = [arrival.at_s for arrival in read_arrivals(load, profile.run.seed)]
    assert load.kind == "poisson" and times[-1] > 3500 and len(times) > 0.9 * 3600 * load.rate_rps
    facts = Facts(Phase.OPEN, entered_s=600.0, started_s=0.0, exhausted=False, load_left=1)
    assert next_phase(600.0 + times[-1], facts, profile)[0] is None, "run.max_s leaves time to read the weights"


def test_profiles_for_gpus_train_with_every_replica_that_has_slack_as_long_as_load_comes(profile):
    layout = make_layout(profile.layout.ranks(1), profile.layout.tp_size, profile.layout.replicas)
    check_inputs(profile, layout)
    assert rounds_may_start(
        600.0, Facts(Phase.OPEN, entered_s=0.0, started_s=0.0, exhausted=False, load_left=1), profile
    )
    replicas = tuple(range(len(layout.replicas)))
    idle = ClusterView(tuple(ReplicaView(r, state=ReplicaState.IDLE, last_seen=600.0) for r in replicas))
    plan, why = plan_round(600.0, idle, Pressure.LOW, History(completed=99), profile)
    assert plan is not None and plan.members == replicas, why


def test_the_way_in_can_be_started_by_its_name():
    """docs/launching.md calls it so. Its first configuration is planned without a launcher, too."""
    command = ["launch/run.py", "--dry-run", "--config", "configs/launch.yaml"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert "federation group of tp_rank 0, all members: ranks [0, 1]" in done.stdout
