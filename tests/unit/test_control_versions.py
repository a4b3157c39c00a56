"""Versions in a whole run, in virtual time: names, canary, rolling back, other adapters, lost replicas and kills.

Promise 2 for requests that name their version, and promise 6 for what an operator chose.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
from control_client import Client, online
from control_run import Run
from msgspec.structs import replace
from scripted_replica import ADAPTER_JSON, SHAPES, adapter_bytes

from clif.adapters.peft_files import PREFIX
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE, AdapterStore
from clif.control.versions import Versions
from clif.types import AdapterVersion, FinishReason, Request, Sampling
from clif.wire.frontend import Ask, Refused

TRAINED_S = 2.4
"""By then three rounds are committed."""


def training(tmp_path: Path, rounds: int = 3, slots: int = 8, **sections: dict[str, Any]) -> Run:
    """Two replicas that make so many versions, and a client's front end."""
    sections = {
        "train": {"enabled": True},
        "federation": {"rounds": rounds, "min_members": 2},
        "adapter": {"serving_slots": slots, "r": 8, "lora_alpha": 16.0},
        "serve": {"http": {"port": 0}, "adapter_root": str(tmp_path / "root")},
        **sections,
    }
    (tmp_path / "root").mkdir(exist_ok=True)
    run = online(tmp_path, **sections)
    for leader in run.leaders:
        leader.busy = 0.0
    return run


def act(client: Client, seconds: float, action: Callable[[], Any]) -> list[Any]:
    """What an operator's action returns, or the problem with which it is refused."""
    found: list[Any] = []

    def do() -> None:
        try:
            found.append(action())
        except Refused as refused:
            found.append(refused.problem)

    client.at(seconds, do)
    return found


def names(versions: Versions) -> list[str]:
    return [row.id for row in versions.models()]


def test_an_old_name_stays_valid_while_kept_and_means_the_same_version(tmp_path: Path) -> None:
    run = training(tmp_path)
    client, versions = Client(run), run.server.versions
    listed = act(client, TRAINED_S, lambda: names(versions))
    asked = {name: client.ask(TRAINED_S, name) for name in ("base", "clif@v0001", "clif@v0002", "clif@v0003", "clif")}
    client.ask(TRAINED_S, "clif@v0004")
    run.go()
    assert listed == [["base", "clif", "clif@v0003", "clif@v0002", "clif@v0001"]]
    answered = {name: {event.version for event in client.events[i] if event.tokens} for name, i in asked.items()}
    assert answered == {"base": {0}, "clif@v0001": {1}, "clif@v0002": {2}, "clif@v0003": {3}, "clif": {3}}
    assert [refusal.problem.kind for refusal in client.refused] == ["not_found"]


def test_with_few_slots_the_newest_alone_is_kept_and_no_promotion_ever_waits(tmp_path: Path) -> None:
    run = training(tmp_path, slots=3)
    client, versions = Client(run), run.server.versions
    listed = act(client, TRAINED_S, lambda: names(versions))
    client.ask(TRAINED_S, "clif@v0001")
    run.go()
    assert listed == [["base", "clif", "clif@v0003"]]
    (refusal,) = client.refused
    assert "clif@v0001 is not kept any more" in refusal.problem.message
    assert all(leader.most_held <= 2 and leader.orders["Keep"] == 0 for leader in run.leaders), "as before"


def test_kept_versions_leave_a_slot_for_the_next_promotion(tmp_path: Path) -> None:
    run = training(tmp_path, rounds=6, slots=4)
    run.go()
    assert len(run.table("rounds")) == 6
    assert max(leader.most_held for leader in run.leaders) == 3


def test_a_rolled_back_version_answers_and_the_next_round_begins_from_it_under_a_new_number(tmp_path: Path) -> None:
    run = training(tmp_path, rounds=4)
    client, server = Client(run), run.server
    # The round of version 3 was promoted, and the next one is under way.
    for leader in run.leaders:
        leader.holds_after = 3
    done = act(client, TRAINED_S, lambda: server.version_actions.roll_back(run.time(), 1))
    asked = client.ask(TRAINED_S + 0.2)
    for leader in run.leaders:
        client.at(TRAINED_S + 0.3, leader.go_on)
    run.go()
    assert done[0].id == "clif@v0001" and done[0].state == "active"
    assert {event.version for event in client.events[asked]} == {1}
    rows = run.table("rounds")
    assert [row["state"] for row in rows] == ["committed", "committed", "committed", "discarded", "committed"]
    assert rows[3]["reason"] == "clif@v0001 was made active"
    assert run.leaders[0].plans[-1].base_version == 1 and rows[-1]["version"] == 4
    version = server.versions.get(4)
    assert version is not None and (version.parent, version.round_id) == (1, 5)
    assert {leader.version for leader in run.leaders} == {4}


def test_rolling_back_to_the_base_answers_as_the_base(tmp_path: Path) -> None:
    run = training(tmp_path)
    client, server = Client(run), run.server
    act(client, TRAINED_S, lambda: server.version_actions.roll_back(run.time(), 0))
    asked = client.ask(TRAINED_S + 0.2)
    run.go()
    assert {event.version for event in client.events[asked]} == {0}
    assert server.versions.active() == 0 and AdapterStore(run.config.run_dir).current() is None


def restarted(run: Run) -> Run:
    """The next start in the same folder, after a kill. Its replicas have loaded what current.json names."""
    config = run.config.model_copy(update={"run": run.config.run.model_copy(update={"resume": True})})
    again = Run(config, after=run, signalled=lambda: "got SIGTERM" if again.time() >= 1002.0 else "")
    for leader in again.leaders:
        leader.busy = 0.0
        leader.version = AdapterStore(config.run_dir).read().active.get("clif", 0)
        leader.loaded = {leader.version} - {0}
    return again


def test_what_an_operator_chose_survives_a_kill(tmp_path: Path) -> None:
    """A rollback, a canary, and a pin of a version that is not among the newest."""
    run = training(tmp_path, rounds=7, slots=7)
    client, actions = Client(run), run.server.version_actions
    for action in (
        lambda: actions.pin(1),
        lambda: actions.set_canary(3, 0.5),
        lambda: actions.roll_back(run.time(), 2),
    ):
        act(client, 3.8, action)
    run.go()
    before = run.server.versions
    again = restarted(run)
    client = Client(again, start=1)
    asked = [client.ask(0.9, "clif@v0001"), *(client.ask(0.9) for _ in range(6))]
    again.go()
    after = again.server.versions
    assert (after.active(), after.pinned, after.canary) == (2, (1,), before.canary) and after.canary is not None
    assert after.kept == before.kept and after.kept[:3] == (1, 2, 3)
    assert all(set(leader.held) == set(after.kept) for leader in again.leaders)
    versions = [client.end_of(i).version for i in asked]
    assert versions[0] == 1 and set(versions[1:]) == {2, 3}


def test_a_rebuilt_replica_gets_all_kept_versions_again(tmp_path: Path) -> None:
    run = training(tmp_path)
    client = Client(run)
    client.at(TRAINED_S, lambda: run.leaders[1].rebuild("RuntimeError: out of memory"))
    asked = [client.ask(TRAINED_S + 0.5, f"clif@v000{1 + i % 3}") for i in range(12)]
    run.go()
    assert run.leaders[1].incarnation == 1 and run.leaders[1].held == (1, 2, 3)
    assert {row["replica"] for row in run.table("requests")} == {0, 1}
    assert [client.end_of(i).version for i in asked] == [1 + i % 3 for i in range(12)]


def test_a_pinned_request_waits_for_a_replica_that_is_being_rebuilt_and_holds_up_no_other(tmp_path: Path) -> None:
    run = training(tmp_path)
    client, server = Client(run), run.server
    for leader in run.leaders:
        # Installs take a while.
        leader.slow_installs_s = 0.3
        client.at(TRAINED_S, lambda leader=leader: leader.rebuild("RuntimeError: out of memory"))  # type: ignore[misc]
    pinned = client.ask(TRAINED_S - 0.01, "clif@v0001", tokens=60)
    for leader in run.leaders:
        client.at(TRAINED_S - 0.05, lambda leader=leader: setattr(leader, "serves", lambda: False))  # type: ignore[misc]
        client.at(TRAINED_S + 0.1, lambda leader=leader: setattr(leader, "serves", lambda: True))  # type: ignore[misc]
    free = client.ask(TRAINED_S + 0.25)
    run.go()
    rows = {row["id"]: row for row in run.table("requests")}
    assert client.end_of(pinned).version == 1 and client.end_of(free).finish is FinishReason.STOP
    assert rows[free]["finished_s"] < rows[pinned]["dispatched_s"]
    assert server.versions.kept == (1, 2, 3)


def test_a_request_that_was_accepted_gets_its_version_though_it_waits_longer_than_it_would_be_kept(
    tmp_path: Path,
) -> None:
    """With as few slots as this the version is kept for it alone, and given up afterwards."""
    run = training(tmp_path, slots=4)
    client, server = Client(run), run.server
    for leader in run.leaders:
        leader.holds_after = 2
        client.at(TRAINED_S - 0.05, lambda leader=leader: setattr(leader, "serves", lambda: False))  # type: ignore[misc]
        client.at(TRAINED_S + 0.1, leader.go_on)
        client.at(TRAINED_S + 0.4, lambda leader=leader: setattr(leader, "serves", lambda: True))  # type: ignore[misc]
    asked = [client.ask(TRAINED_S, "clif@v0001") for _ in range(12)]
    kept = act(client, TRAINED_S + 0.35, lambda: (server.versions.active(), server.versions.kept))
    run.go()
    assert kept == [(3, (1, 3))] or kept == [(3, (1, 2, 3))]
    assert [client.end_of(i).version for i in asked] == [1] * 12
    assert server.versions.kept == (2, 3)


def test_a_request_that_came_just_before_a_promotion_gets_its_version(tmp_path: Path) -> None:
    """Both are read in one step: the promotion would give the version up, and the request is not submitted yet."""
    run = training(tmp_path, slots=4)
    client, versions, frontend = Client(run), run.server.versions, run.frontend
    assert frontend is not None
    add, kept = versions.add, []
    request = Request(id=client.next_id, prompt=(1, 2, 3), sampling=Sampling(max_tokens=4))

    def promote(version: AdapterVersion, *files: Any, **chosen: Any) -> None:
        if version.number == 3:
            frontend.take(run.time(), msgspec.msgpack.encode(Ask(request=request, model="clif@v0001")))
        add(version, *files, **chosen)
        kept.append(versions.kept)

    versions.add = promote  # type: ignore[method-assign]
    run.go()
    assert kept == [(1,), (1, 2), (1, 3)]
    assert client.end_of(request.id).version == 1 and versions.kept == (2, 3)


def test_a_pinned_request_whose_version_is_given_up_ends_as_failed_with_a_sentence(tmp_path: Path) -> None:
    run = training(tmp_path)
    client, server = Client(run), run.server
    for leader in run.leaders:
        client.at(TRAINED_S - 0.05, lambda leader=leader: setattr(leader, "serves", lambda: False))  # type: ignore[misc]
    asked = [client.ask(TRAINED_S, "clif@v0001") for _ in range(9)]
    # The ninth is not at a replica yet when its version goes.
    act(client, TRAINED_S + 0.1, lambda: server.versions.mark_unreadable(1))
    for leader in run.leaders:
        client.at(TRAINED_S + 0.3, lambda leader=leader: setattr(leader, "serves", lambda: True))  # type: ignore[misc]
    run.go()
    ends = [client.end_of(i) for i in asked]
    assert [end.version for end in ends[:8]] == [1] * 8
    assert ends[8].finish is FinishReason.FAILED
    assert ends[8].detail == "adapter version 1 is not kept any more: ask for another one"


def folder(root: Path, name: str, value: float = 0.5, r: int = 8, alpha: float = 16.0) -> str:
    """A PEFT folder that fits the scripted replicas' model."""
    (root / name).mkdir(parents=True)
    described = {**json.loads(ADAPTER_JSON), "r": r, "lora_alpha": alpha}
    (root / name / CONFIG_FILE).write_text(json.dumps(described))
    sizes = {key: (r, 4) if "lora_A" in key else (4, r) for key in SHAPES}
    tensors = {PREFIX + key: np.full(size, value, np.float32) for key, size in sizes.items()}
    (root / name / WEIGHTS_FILE).write_bytes(safetensors.numpy.save(tensors))
    return name


def test_a_loaded_folder_of_another_adapter_answers_by_its_name_and_leaves_clif_alone(tmp_path: Path) -> None:
    run = training(tmp_path)
    client, server = Client(run), run.server
    folder(tmp_path / "root", "sales")
    loaded = act(client, TRAINED_S, lambda: server.version_actions.load_folder(run.time(), "sales", "support"))
    asked = {name: client.ask(TRAINED_S + 0.3, name) for name in ("support", "support@v0004", "clif")}
    wrong = client.ask(TRAINED_S + 0.3, "clif@v0004")
    run.go()
    assert (loaded[0].id, loaded[0].state, loaded[0].parent, loaded[0].round) == ("support@v0004", "active", 0, 0)
    assert [client.end_of(i).version for i in asked.values()] == [4, 4, 3]
    assert [refusal.request_id for refusal in client.refused] == [wrong]
    assert {leader.version for leader in run.leaders} == {3}
    (row,) = [row for row in run.table("adapters") if row["version"] == 4]
    assert (row["adapter"], row["round_id"], row["job"]) == ("support", 0, "")
    assert AdapterStore(run.config.run_dir).weights(4) == adapter_bytes()


def test_another_adapter_that_was_rolled_back_to_the_base_answers_as_the_base(tmp_path: Path) -> None:
    run = training(tmp_path)
    client, actions = Client(run), run.server.version_actions
    folder(tmp_path / "root", "sales")
    act(client, TRAINED_S, lambda: actions.load_folder(run.time(), "sales", "support"))
    act(client, TRAINED_S + 0.2, lambda: actions.roll_back(run.time(), 0, "support"))
    asked = {name: client.ask(TRAINED_S + 0.4, name) for name in ("support", "clif")}
    run.go()
    assert not client.refused and [client.end_of(i).version for i in asked.values()] == [0, 3]


def test_a_promotion_of_another_adapter_leaves_clif_alone(tmp_path: Path) -> None:
    """The version of a round for a job's adapter: its members and all others hold it, and none answers with it."""
    run = training(tmp_path, rounds=2)
    client, server = Client(run), run.server

    def begin() -> None:
        plan = replace(run.leaders[0].plans[-1], round_id=3, members=(0,), incarnations=(0,), base_version=0)
        plan = replace(plan, adapter="support")
        server.federation.start(run.time(), plan, "a test")

    client.at(TRAINED_S, begin)
    asked = {name: client.ask(TRAINED_S + 0.5, name) for name in ("clif", "support", "support@v0003", "clif@v0002")}
    run.go()
    assert server.versions.all_active == {"clif": 2, "support": 3}
    version = server.versions.get(3)
    assert version is not None and (version.adapter, version.parent) == ("support", 0)
    assert [client.end_of(i).version for i in asked.values()] == [2, 3, 3, 2]
    assert [leader.version for leader in run.leaders] == [2, 2]
    assert all(leader.held == (1, 2, 3) for leader in run.leaders)


REFUSED: list[tuple[Callable[[Any, float], Any], str, str]] = [
    (lambda a, now: a.roll_back(now, 9), "not_found", "there is no stored version 9"),
    (lambda a, now: a.set_canary(3, 0.5), "conflict", "clif@v0003 is the active version already"),
    (lambda a, now: a.set_canary(1, 0.0), "invalid", "share is 0.0: it must be above 0"),
    (lambda a, now: a.set_canary(1, float("nan")), "invalid", "share is nan: it must be above 0"),
    (lambda a, now: a.retire(now, "clif"), "invalid", "it answers by default: roll it back to 0"),
    (lambda a, now: a.retire(now, "support"), "invalid", "there is none of this name"),
    (lambda a, now: a.load_folder(now, "../outside", "x"), "forbidden", "outside is no folder below serve.adapter"),
    (lambda a, now: a.load_folder(now, "link", "x"), "forbidden", "link is no folder below serve.adapter_root"),
    (
        lambda a, now: a.load_folder(now, "links", "x"),
        "forbidden",
        "adapter_model.safetensors of links lies outside",
    ),
    (lambda a, now: a.load_folder(now, "none", "x"), "invalid", "none cannot be found below serve.adapter_root"),
    (lambda a, now: a.load_folder(now, "sales", "Not OK"), "invalid", "'Not OK' cannot name an adapter"),
    (lambda a, now: a.load_folder(now, "sales", "base"), "invalid", "'base' cannot name an adapter"),
    (lambda a, now: a.load_folder(now, "empty", "x"), "invalid", "empty is not a PEFT adapter folder"),
    (lambda a, now: a.export(9, "out"), "not_found", "there is no stored version 9"),
    (lambda a, now: a.export(1, "../out"), "forbidden", "is no folder below serve.adapter_root"),
    (lambda a, now: a.export(1, "sales"), "conflict", "sales is there already"),
    (lambda a, now: a.export(1, "link"), "conflict", "link is there already"),
    (lambda a, now: [a.pin(1), a.pin(2)], "conflict", "makes 3 versions to keep, and 3 slots keep 2"),
]
"""The last one is refused in its second part."""


def test_what_cannot_be_done_with_versions_is_refused_with_a_sentence_and_changes_nothing(tmp_path: Path) -> None:
    run = training(tmp_path, slots=3)
    root, outside = tmp_path / "root", tmp_path / "outside"
    folder(root, "sales")
    folder(tmp_path, "outside")
    (root / "link").symlink_to(outside)
    (root / "links").mkdir()
    (root / "links" / CONFIG_FILE).write_bytes((outside / CONFIG_FILE).read_bytes())
    (root / "links" / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    (root / "empty").mkdir()
    client, server = Client(run), run.server
    actions, store = server.version_actions, AdapterStore(run.config.run_dir)
    before = act(client, TRAINED_S - 0.01, store.read)
    found = [act(client, TRAINED_S, lambda action=action: action(actions, run.time())) for action, _, _ in REFUSED]
    after = act(client, TRAINED_S + 0.01, store.read)
    run.go()
    for (problem,), (_, kind, sentence) in zip(found, REFUSED, strict=True):
        assert problem.kind == kind and sentence in problem.message
    assert after == [replace(before[0], pinned=(1,))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "root", "rows.jsonl", "run"]


def test_a_version_whose_files_are_gone_cannot_be_chosen_and_costs_no_other(tmp_path: Path) -> None:
    run = training(tmp_path, rounds=5, slots=4)
    client, server = Client(run), run.server
    store = AdapterStore(run.config.run_dir)
    client.at(3.0, (store.path(1) / WEIGHTS_FILE).unlink)
    found = act(client, 3.1, lambda: server.version_actions.roll_back(run.time(), 1))
    asked = client.ask(3.3)
    run.go()
    assert found[0].kind == "conflict" and "the weights of clif@v0001 are gone: restore " in found[0].message
    assert client.end_of(asked).version == 5


def test_without_a_root_no_folder_is_read_or_written(tmp_path: Path) -> None:
    run = training(tmp_path, serve={"http": {"port": 0}})
    client, actions = Client(run), run.server.version_actions
    found = act(client, TRAINED_S, lambda: actions.load_folder(run.time(), str(tmp_path / "root"), "x"))
    found += act(client, TRAINED_S, lambda: actions.export(1, "out"))
    run.go()
    assert all(problem.message.startswith("serve.adapter_root is not set") for problem in found)


def test_a_retired_adapter_gives_its_slot_back_and_its_name_means_nothing(tmp_path: Path) -> None:
    run = training(tmp_path, slots=3)
    client, server = Client(run), run.server
    folder(tmp_path / "root", "sales")
    actions = server.version_actions
    act(client, TRAINED_S, lambda: actions.load_folder(run.time(), "sales", "support"))
    full = act(client, TRAINED_S + 0.1, lambda: actions.load_folder(run.time(), "sales", "other"))
    act(client, TRAINED_S + 0.2, lambda: actions.retire(run.time(), "support"))
    client.ask(TRAINED_S + 0.3, "support")
    run.go()
    assert full[0].kind == "conflict" and "3 versions to keep" in full[0].message
    assert [refusal.problem.kind for refusal in client.refused] == ["not_found"]
    assert all(leader.held == (3,) for leader in run.leaders)


def test_a_replica_that_answers_with_another_version_than_was_asked_for_is_broken(tmp_path: Path) -> None:
    run = training(tmp_path)
    client = Client(run)
    run.leaders[0].lies = True
    client.ask(TRAINED_S, "clif@v0001")
    client.ask(TRAINED_S, "clif@v0001")
    run.go()
    broken = [row["reason"] for row in run.table("transitions") if row["to_state"] == "failed"]
    assert len(broken) == 1 and "tokens of version 3, 1 was asked for" in broken[0]
    assert {event.version for events in client.events.values() for event in events} == {1}
