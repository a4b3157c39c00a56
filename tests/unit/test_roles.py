"""The baselines of run.mode: who serves, who trains, and that no decision of theirs looks at slack or pressure."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm

from clif.config import Config, ConfigError, config_from_tree, load_config
from clif.control.policy.batch_sizes import choose_batches
from clif.control.policy.pressure import Pressure
from clif.control.policy.replica_state import next_state, state_after_round
from clif.control.policy.round_admission import History, plan_round, wants_rounds
from clif.control.policy.routing import Dispatch, RoutingView, choose_replica
from clif.control.policy.view import ClusterView, ReplicaView
from clif.distributed.layout import make_layout
from clif.distributed.roles import Role, check_roles, fewest_replicas, role_of
from clif.latency import Fit
from clif.states import ReplicaState
from clif.types import Request, Sampling

REPO = Path(__file__).resolve().parents[2]
IDLE, SERVING, COMBINED, FAILED = ReplicaState.IDLE, ReplicaState.SERVING, ReplicaState.COMBINED, ReplicaState.FAILED
SERVER, TRAINER = Role(trains=False), Role(serves=False)


def make_config(mode: str, **sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "run": {"mode": mode, **sections.pop("run", {})},
        "model": {"path": "m"},
        "data": {"path": __file__},
        "train": {"enabled": mode != "serve_only"},
    }
    return config_from_tree({**tree, **sections})


def cluster(config: Config, *states: ReplicaState, **values: Any) -> ClusterView:
    """Replicas in these states with the roles of the mode; all are pressed hard."""
    base = ReplicaView(0, max_batch=4, batch_cap=4, kv_tokens=1000, last_seen=100.0, pressure_since=1.0, **values)
    roles = [role_of(i, len(states), config.run) for i in range(len(states))]
    return ClusterView(
        tuple(replace(base, replica=i, state=s, role=r) for i, (s, r) in enumerate(zip(states, roles, strict=True)))
    )


def route(view: ClusterView, config: Config) -> tuple[int | None, str]:
    request = Request(id=1, prompt=(1, 2), sampling=Sampling(max_tokens=8))
    decision, reason = choose_replica(100.0, request, 100.0, RoutingView(view.replicas), config)
    return (decision.replica if isinstance(decision, Dispatch) else None), reason


def members(view: ClusterView, config: Config, pressure: Pressure = Pressure.HIGH) -> tuple[int, ...]:
    plan, reason = plan_round(100.0, view, pressure, History(), config)
    assert reason
    return plan.members if plan else ()


@pytest.mark.parametrize(
    ("mode", "trainers", "roles"),
    [
        ("clif", 1, [Role(), Role(), Role()]),
        ("serve_only", 1, [SERVER, SERVER, SERVER]),
        ("train_only", 1, [Role(), Role(), Role()]),
        ("time_slice", 1, [Role(), Role(), Role()]),
        ("split", 1, [SERVER, SERVER, TRAINER]),
        ("split", 2, [SERVER, TRAINER, TRAINER]),
    ],
)
def test_each_mode_gives_each_replica_its_role(mode: str, trainers: int, roles: list[Role]) -> None:
    config = make_config(mode, run={"trainers": trainers})
    assert [role_of(i, 3, config.run) for i in range(3)] == roles


@pytest.mark.parametrize(
    ("mode", "run", "federation", "replicas", "sentence"),
    [
        ("split", {}, {}, 1, "needs at least 2 replicas, not 1: start more ranks"),
        ("split", {"trainers": 3}, {}, 3, "needs at least 4 replicas, not 3"),
        ("split", {}, {"min_members": 2}, 3, "min_members 2 exceeds the 1 trainers: lower it or raise run.trainers"),
        ("clif", {}, {"min_members": 3}, 2, "min_members 3 exceeds the 2 replicas: lower it or start more ranks"),
    ],
)
def test_replicas_that_cannot_do_what_the_mode_asks_are_refused(mode, run, federation, replicas, sentence) -> None:
    config = make_config(mode, run=run, federation=federation)
    with pytest.raises(ConfigError, match=sentence):
        check_roles(config, make_layout(replicas))


def test_replicas_that_can_do_what_the_mode_asks_are_accepted() -> None:
    check_roles(make_config("split"), make_layout(2))
    check_roles(make_config("split", run={"trainers": 2}, federation={"min_members": 2}), make_layout(3))


# --- split ---------------------------------------------------------------------------------------


def test_split_trainers_are_never_routed_a_request_however_full_the_servers_are() -> None:
    config = make_config("split")
    view = cluster(config, SERVING, IDLE)
    assert route(view, config)[0] == 0
    full = ClusterView((replace(view.replicas[0], outstanding=4), view.replicas[1]))
    assert route(full, config) == (None, "none of 1 replicas has room")
    lost = ClusterView((replace(view.replicas[0], state=FAILED), view.replicas[1]))
    assert route(lost, config) == (None, "no replica that serves is alive")


def test_split_servers_never_join_a_round_and_trainers_join_under_any_pressure() -> None:
    config = make_config("split")
    view = cluster(config, SERVING, SERVING, IDLE, slack_since=1.0)
    for pressure in Pressure:
        assert members(view, config, pressure) == (2,), "and the slack of servers is not waited for"
    for server in view.replicas[:2]:
        assert next_state(100.0, server, config) == (None, "only serves")


# --- all baselines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"run": {"mode": "time_slice"}}, "run.mode time_slice needs replicas of one rank: set layout.tp_size=1"),
        ({"engine": {"coserving": "concurrent"}}, "engine.coserving concurrent needs replicas of one rank: set "),
    ],
)
def test_what_needs_replicas_of_one_rank_is_refused_before_a_model_is_loaded(sections, sentence) -> None:
    config = make_config(sections.pop("run", {}).get("mode", "clif"), **sections)
    check_roles(config, make_layout(2))
    with pytest.raises(ConfigError, match=sentence):
        check_roles(config, make_layout(4, 2))


def test_slices_beside_serving_are_refused_where_there_are_no_threads_for_them() -> None:
    sections = {"engine": {"coserving": "concurrent"}, "dist": {"threads_per_rank": 1}}
    with pytest.raises(ConfigError, match=r"coserving concurrent .*on a CPU.*coserving=interleaved"):
        check_roles(make_config("clif", **sections), make_layout(1))
    # A GPU has streams.
    check_roles(make_config("clif", model={"path": "m", "device": "cuda"}, **sections), make_layout(1))


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [((), 1), (("federation.min_members=2",), 2), (("run.mode=split", "run.trainers=2"), 3)],
)
def test_a_dry_run_without_a_launcher_plans_for_as_many_replicas_as_the_configuration_needs(overrides, ranks) -> None:
    config = load_config(REPO / "configs/smoke.yaml", (f"data.path={REPO}/configs/data/words.jsonl", *overrides))
    assert fewest_replicas(config) == ranks
    check_roles(config, make_layout(ranks))
    if ranks > 1:
        with pytest.raises(ConfigError, match="start more ranks"):
            check_roles(config, make_layout(ranks - 1))


@pytest.mark.parametrize("mode", ["time_slice", "train_only"])
def test_rounds_of_a_mode_that_does_not_look_at_pressure_take_every_replica(mode: str) -> None:
    config = make_config(mode)
    view = cluster(config, IDLE, IDLE, utilisation=1.0)
    for pressure in Pressure:
        assert members(view, config, pressure) == (0, 1)


@pytest.mark.parametrize("mode", ["time_slice", "train_only"])
def test_a_replica_that_trains_without_looking_is_idle_between_rounds_however_busy(mode: str) -> None:
    config = make_config(mode)
    serving, idle, combined = cluster(config, SERVING, IDLE, COMBINED, utilisation=1.0).replicas
    assert next_state(100.0, serving, config)[0] is IDLE
    assert next_state(100.0, idle, config)[0] is None
    assert next_state(100.0, combined, config)[0] is None
    assert state_after_round(combined, config) is IDLE


def test_a_silent_replica_is_lost_in_every_mode() -> None:
    for mode in ("clif", "serve_only", "train_only", "time_slice", "split"):
        config = make_config(mode)
        assert all(next_state(200.0, r, config)[0] is FAILED for r in cluster(config, SERVING, COMBINED).replicas)


def test_serve_only_has_no_rounds_and_leaves_replicas_serving() -> None:
    config = make_config("serve_only")
    view = cluster(config, SERVING, SERVING, slack_since=1.0)
    assert next_state(100.0, view.replicas[0], config) == (None, "only serves")
    assert members(view, config, Pressure.LOW) == ()
    assert route(view, config)[0] is not None


def test_baselines_keep_the_configured_batch_sizes() -> None:
    known = Fit(0.001, 0.001, 0.01, confidence=0.9)
    for mode in ("clif", "time_slice"):
        config = make_config(mode)
        view = cluster(config, COMBINED, serve=known, train=known).replicas[0]
        assert (choose_batches(0.0, view, 1, None, config)[0] is None) == (mode == "time_slice")


def test_rounds_without_load_are_wanted_if_asked_for_or_if_training_is_all_there_is() -> None:
    """Training that is switched on takes place: without load for run.linger_s, in every mode."""
    for mode in ("train_only", "clif", "time_slice", "split"):
        assert wants_rounds(History(completed=9), make_config(mode))
    assert not wants_rounds(History(), make_config("clif", load={"kind": "poisson"}))
    assert not wants_rounds(History(), make_config("serve_only"))
    target = make_config("train_only", federation={"rounds": 2})
    assert wants_rounds(History(completed=1), target) and not wants_rounds(History(completed=2), target)


# --- the way in ----------------------------------------------------------------------------------


def dry_run(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = ["launch/run.py", "--dry-run", "--config", "configs/smoke.yaml", *overrides]
    return warm.run(command)


def test_a_split_of_one_replica_is_refused_before_anything_starts() -> None:
    done = dry_run("run.mode=split", "layout.replicas=1")
    assert done.returncode == 2
    assert "run.mode split with run.trainers 1 needs at least 2 replicas, not 1" in done.stderr


def test_the_layout_that_is_printed_says_who_only_serves_and_who_only_trains() -> None:
    lines = dry_run("run.mode=split", "layout.replicas=2").stdout.splitlines()
    assert lines[:2] == ["replica 0: ranks [0], leader 0, only serves", "replica 1: ranks [1], leader 1, only trains"]


def test_replicas_that_train_must_have_equally_many_ranks() -> None:
    layout = make_layout(3, replica_gpus=((0, 1), (2,)))
    with pytest.raises(ConfigError, match=r"the replicas that train have \[1, 2\] ranks"):
        check_roles(make_config("clif"), layout)
    # Who only serves may have as many as he likes.
    check_roles(make_config("serve_only", train={"enabled": False}), layout)
