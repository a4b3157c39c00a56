"""When silence means that a replica is lost, and when only that nobody could speak."""

from __future__ import annotations

from pathlib import Path

import pytest
from control_run import SERVES, Run, make_config

from clif.config import config_from_tree
from clif.control.fleet import Fleet
from clif.control.held import HeldRequests
from clif.control.policy.replica_state import next_state
from clif.states import ReplicaState
from clif.wire.messages import Hello

CONFIG = config_from_tree({"model": {"path": "m"}, "train": {"enabled": False}, "control": {"lost_after_s": 20.0}})


class Replicas:
    """Replicas 0 and 1 on a clock of their own."""

    def __init__(self) -> None:
        self.fleet = Fleet(CONFIG, 2, lambda *_: True, HeldRequests(), lambda *_: None)
        self.now = 100.0
        for replica in (0, 1):
            hello = Hello(
                replica=replica, rank=replica, host="h", pid=1, max_batch=4, kv_tokens=1000,
                max_context=500, vocabulary=300, adapter="", heldout_rows=0, dtype="float32", load_s=0.0,
            )  # fmt: skip
            self.fleet.join(self.now, hello)

    def speak(self, *replicas: int, seconds: float) -> None:
        """These report a few times a second; then it is so much later."""
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            for replica in replicas:
                self.fleet.on_message(self.now, replica)

    def lost(self, all_silent_limit_s: float) -> list[bool]:
        views = [self.fleet.view_of(replica) for replica in (0, 1)]
        return [next_state(self.now, view, CONFIG, all_silent_limit_s)[0] is ReplicaState.FAILED for view in views]


def test_who_is_silent_while_others_speak_is_lost() -> None:
    replicas = Replicas()
    replicas.speak(0, seconds=19)
    assert replicas.lost(120.0) == [False, False]
    replicas.speak(0, seconds=2)
    assert replicas.lost(120.0) == [False, True]


def test_nobody_is_lost_because_nobody_could_speak() -> None:
    replicas = Replicas()
    replicas.speak(0, 1, seconds=5)
    replicas.now += 90.0
    assert replicas.lost(120.0) == [False, False]
    replicas.speak(0, seconds=1)
    assert replicas.lost(120.0) == [False, False], "one of them is the first to speak again"
    replicas.speak(0, seconds=20)
    assert replicas.lost(120.0) == [False, True], "the other had as long as ever to speak as well"


def test_the_silence_of_all_is_put_up_with_for_a_time() -> None:
    replicas = Replicas()
    replicas.now += 139.0
    assert replicas.lost(120.0) == [False, False]
    replicas.now += 2.0
    assert replicas.lost(120.0) == [True, True]


def test_where_the_launcher_would_start_all_anew_nobody_waits() -> None:
    replicas = Replicas()
    replicas.now += 21.0
    assert replicas.lost(0.0) == [True, True]


def test_a_run_goes_on_after_a_silence_of_all_its_replicas(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A starved host: both leaders stand still for three times as long as one of them could."""
    run = Run(make_config(tmp_path, **SERVES, control={"lost_after_s": 0.5}), silent={0: 1, 1: 1})
    for leader in run.leaders:
        leader.wakes = True
    run.go()
    run.assert_promise_1()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}
    assert "failed" not in {row["to_state"] for row in run.table("transitions")}
    assert "no replica has spoken for 0.5 s" in caplog.text
