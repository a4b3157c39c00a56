"""What is shown of a run while it lasts, against its tables; and what an operator may ask for."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from control_client import BEGIN_S, Client, online
from control_run import Run, make_config

from clif.config import Config, config_from_tree
from clif.control.dispatcher import RequestRecord
from clif.control.durability.journal import Began
from clif.control.durability.recovery import add_up
from clif.control.events import KEPT, Events
from clif.control.policy.pressure import Pressure
from clif.control.policy.round_admission import History, plan_round
from clif.control.policy.routing import RoutingView
from clif.control.policy.view import ClusterView, ReplicaView
from clif.control.status_file import StatusFile
from clif.control.totals import VERSIONS_COUNTED, Histogram, Totals
from clif.states import ReplicaState
from clif.storage.run_folder import STATUS_FILE
from clif.types import FinishReason, Request, Sampling
from clif.wire.frontend import (
    Command,
    DrainReplica,
    ListVersions,
    PauseTraining,
    ResumeTraining,
    RollBack,
    SetCanary,
    UndrainReplica,
    as_json,
    decode_from_frontend,
)

TRAINS: dict[str, dict[str, Any]] = {
    "train": {"enabled": True},
    "federation": {"rounds": 1, "local_steps": 2, "min_members": 2},
}


def watched(run: Run) -> Client:
    """A front end that asks for twenty answers."""
    client = Client(run)
    for i in range(20):
        client.ask(BEGIN_S + 0.1 * i)
    return client


def status_of(run: Run) -> dict[str, Any]:
    """As JSON: what a front end would get now."""
    body: dict[str, Any] = json.loads(as_json(run.server.status.body(run.time())))
    return body


def test_the_counts_are_those_of_the_tables(tmp_path: Path) -> None:
    run = online(tmp_path, **TRAINS)
    watched(run)
    run.go()
    body, rows = status_of(run), [row for row in run.table("requests") if row["purpose"] == "user"]
    totals = body["totals"]
    assert Counter({k: n for k, n in totals["requests"].items() if n}) == Counter(row["finish"] for row in rows)
    assert totals["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert totals["generated_tokens"] == sum(row["output_tokens"] for row in rows)
    assert totals["slo_met"] == sum(row["slo_met"] for row in rows)
    assert sum(totals["ttft_s"]["counts"]) == len(rows)
    assert totals["ttft_s"]["sum"] == pytest.approx(sum(row["ttft_s"] for row in rows), abs=1e-5)
    assert sum(totals["itl_s"]["counts"]) == len(run.table("gaps"))
    assert totals["e2e_s"]["sum"] == pytest.approx(sum(row["e2e_s"] for row in rows), abs=1e-5)
    (ended,) = run.table("rounds")
    assert totals["rounds"] == {"committed": 1, "discarded": 0}
    assert (totals["trained_tokens"], totals["trained_samples"]) == (ended["tokens"], ended["samples"])
    version, base = body["versions"]
    assert base["id"] == "base" and base["requests"] + version["requests"] == len(rows)
    assert version["version"] == 1 and version["heldout_loss"] == pytest.approx(ended["heldout_candidate"])
    assert version["requests"] == sum(row["version"] == 1 for row in rows)


def test_events_tell_states_rounds_and_versions_with_their_reasons(tmp_path: Path) -> None:
    run = online(tmp_path, **TRAINS)
    watched(run)
    run.go()
    events = status_of(run)["events"]
    assert [event["number"] for event in events] == list(range(1, len(events) + 1))
    states = [event for event in events if event["kind"] == "state"]
    rows = run.table("transitions")
    assert [(e["replica"], e["after"]) for e in states] == [(row["replica"], row["to_state"]) for row in rows]
    assert all(row["reason"] in event["text"] for row, event in zip(rows, states, strict=True))
    assert {event["kind"] for event in events} >= {"state", "round", "version", "pressure"}


def test_the_status_stays_bounded_on_hundreds_of_replicas(tmp_path: Path) -> None:
    config = make_config(tmp_path, federation={"rounds": None}, train={"enabled": False}, load={"kind": "none"})
    run = Run(config, leaders=300, signalled=lambda: "enough" if run.time() > 1000.2 else "")
    run.go()
    body = status_of(run)
    assert body["states"]["serving"] == body["replica_count"] == 300
    assert len(body["replicas"]) == 64 and len(body["events"]) == KEPT
    assert len(msgspec.json.encode(body)) < 64_000


def test_the_status_holds_no_key_and_no_word_of_a_client(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    client.ask(BEGIN_S, prompt=(41, 42, 43))
    run.go()
    text = client.status[-1].body.decode()
    assert "41,42" not in text and 'prompt"' not in text and "key" not in text


def test_old_events_are_forgotten_and_numbers_show_it() -> None:
    events = Events()
    for i in range(KEPT + 5):
        events.add(float(i), "state", "x")
    assert [e["number"] for e in events.body(100.0, 1e9)] == list(range(6, KEPT + 6))
    assert events.body(100.0, 1e9)[-1]["unix"] == 1e9 - (100.0 - (KEPT + 4))


def test_a_value_on_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram((0.1, 1.0))
    histogram.add_all([0.1, 0.100001, 1.0, 5.0])
    assert histogram.counts == [1, 2, 1] and histogram.sum == pytest.approx(6.200001)


def test_counts_of_versions_are_bounded_and_the_base_stays() -> None:
    totals, request = Totals(), Request(id=1, prompt=(1,), sampling=Sampling(max_tokens=2))
    for version in range(2 * VERSIONS_COUNTED):
        totals.request(
            RequestRecord(request, 0.0, version=version, token_times=[1.0], finished_s=1.0, finish=FinishReason.STOP)
        )
    assert len(totals.versions) == VERSIONS_COUNTED
    assert min(totals.versions) == 0 and max(totals.versions) == 2 * VERSIONS_COUNTED - 1


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_written_once_a_second_as_a_whole_and_a_full_disk_ends_nothing(tmp_path: Path, caplog: Any) -> None:
    file = StatusFile(tmp_path, wall=lambda: 17.0)
    assert file.due(100.0)
    file.write(100.0, {"run": {"phase": "open"}})
    assert not file.due(100.9)
    file.close(101.0, {"run": {"phase": "done"}})
    written = json.loads((tmp_path / STATUS_FILE).read_text())
    assert written == {"written_unix": 17.0, "run": {"phase": "done"}}
    assert (tmp_path / STATUS_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]
    lost = StatusFile(tmp_path / "gone")
    lost.write(100.0, {})
    lost.close(101.0, {})
    assert len([r for r in caplog.records if "cannot be written" in r.message]) == 1


# --- the operator ----------------------------------------------------------------------------------------------------


def idle(count: int) -> ClusterView:
    """Replicas that are idle since long ago."""
    base = ReplicaView(0, state=ReplicaState.IDLE, state_since=90.0, last_seen=100.0)
    return ClusterView(tuple(replace(base, replica=i) for i in range(count)))


def adaptive() -> Config:
    return config_from_tree({"model": {"path": "m"}, "data": {"path": __file__}})


def test_a_pause_keeps_rounds_from_beginning_and_is_the_reason() -> None:
    assert plan_round(100.0, idle(2), Pressure.LOW, History(), adaptive())[0] is not None
    paused = replace(idle(2), paused="the demo is on")
    decided = plan_round(100.0, paused, Pressure.LOW, History(), adaptive())
    assert decided == (None, "training is paused: the demo is on")


def test_a_drained_replica_joins_no_round_and_gets_no_request() -> None:
    views = [*idle(3).replicas]
    views[1] = replace(views[1], drained="new memory")
    plan, _ = plan_round(100.0, ClusterView(tuple(views)), Pressure.LOW, History(), adaptive())
    assert plan is not None and plan.members == (0, 2)
    assert list(RoutingView(views).serving) == [True, False, True]


def act(client: Client, seconds: float, action: Any) -> None:
    command = Command(id=len(client.replies) + 1, action=action)
    client.at(seconds, lambda: client.line.send(command))


def test_training_that_is_paused_begins_once_it_is_resumed(tmp_path: Path) -> None:
    run = online(tmp_path, **TRAINS)
    client = watched(run)
    act(client, 0.0, PauseTraining(reason="a demo"))
    client.at(2.0, lambda: seen.append(status_of(run)["training"]))
    act(client, 2.5, ResumeTraining())
    seen: list[dict[str, Any]] = []
    run.go()
    assert seen[0]["paused"] == "a demo" and seen[0]["reason"] == "training is paused: a demo"
    (row,) = run.table("rounds")
    assert row["started_s"] > 2.5
    assert [json.loads(reply.body)["paused"] for reply in client.replies] == [True, False]
    texts = [event["text"] for event in status_of(run)["events"] if event["kind"] == "operator"]
    assert texts == ["training is paused: a demo", "training goes on"]


def test_a_drained_replica_ends_what_it_has_and_gets_nothing_more_until_it_is_undrained(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = watched(run)
    act(client, BEGIN_S + 0.45, DrainReplica(replica=0))
    asked = [client.ask(BEGIN_S + 2.2 + 0.01 * i) for i in range(8)]
    act(client, BEGIN_S + 2.1, UndrainReplica(replica=0))
    run.go()
    rows = [row for row in run.table("requests") if row["purpose"] == "user"]
    assert {row["finish"] for row in rows} == {"stop"}
    late = {row["replica"] for row in rows if BEGIN_S + 0.46 < row["dispatched_s"] < BEGIN_S + 2.09}
    assert late == {1}
    assert {row["replica"] for row in rows if row["id"] in asked} == {0}, "it is as free as the other one"


def test_the_last_replica_that_takes_requests_is_not_drained_and_unknown_ones_are_named(tmp_path: Path) -> None:
    run = online(tmp_path)
    client = Client(run)
    for action in (DrainReplica(replica=1), DrainReplica(replica=0), DrainReplica(replica=7)):
        act(client, BEGIN_S, action)
    run.go()
    problems = [reply.problem for reply in client.replies]
    assert problems[0] is None
    assert problems[1] is not None and problems[1].kind == "conflict" and "the last one" in problems[1].message
    assert problems[2] is not None and problems[2].kind == "not_found" and "0 to 1" in problems[2].message


def test_what_an_operator_asked_for_outlives_a_restart_and_ends_with_the_run(tmp_path: Path) -> None:
    run = online(tmp_path, **TRAINS)
    client = Client(run)
    act(client, 0.0, PauseTraining(reason="a demo"))
    act(client, BEGIN_S, DrainReplica(replica=1, reason="new memory"))
    run.go()
    again = Run(run.config, after=run, signalled=lambda: "got SIGTERM" if again.time() >= 1003.0 else "")
    Client(again, start=1)
    again.go()
    body = status_of(again)
    assert not again.table("rounds") and body["training"]["paused"] == "a demo"
    assert [view["drained"] for view in body["replicas"]] == ["", "new memory"]
    lines = [*again.journal.lines, Began(load="another", first_id=0, continued=False)]
    past = add_up(lines)
    assert (past.paused, past.drained) == ("", {}), "another run in the folder is a new one"


def test_a_version_is_rolled_back_and_made_active_again_and_both_are_events(tmp_path: Path) -> None:
    run = online(tmp_path, **TRAINS)
    client = watched(run)
    act(client, 3.0, RollBack(version=0))
    client.at(3.2, lambda: seen.append(status_of(run)["run"]["version"]))
    act(client, 3.3, RollBack(version=1))
    act(client, 3.4, SetCanary(version=1, share=0.5))
    act(client, 3.5, ListVersions())
    seen: list[int] = []
    run.go()
    assert seen == [0] and status_of(run)["run"]["version"] == 1
    assert [reply.problem.kind if reply.problem else "" for reply in client.replies] == ["", "", "conflict", ""]
    assert json.loads(client.replies[-1].body)["active"] == {"clif": 1}
    texts = [event["text"] for event in status_of(run)["events"] if event["kind"] == "operator"]
    assert texts == [
        "base was made the active version of adapter clif",
        "clif@v0001 was made the active version of adapter clif",
    ]


def test_an_action_outside_of_its_bounds_is_not_read() -> None:
    for action in (DrainReplica(replica=-1), PauseTraining(reason="x" * 201)):
        with pytest.raises(msgspec.ValidationError, match="Expected"):
            decode_from_frontend(msgspec.msgpack.encode(Command(id=1, action=action)))
