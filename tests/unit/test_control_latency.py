"""What the fleet knows of its replicas: which are alive, and what serving takes, so that rounds may begin beside it."""

from __future__ import annotations

import msgspec

from clif.config import config_from_tree
from clif.control.fleet import Fleet
from clif.states import ReplicaState
from clif.wire.messages import Hello, Report

CONFIG = config_from_tree({"model": {"path": "m"}, "data": {"path": __file__}})


def report(replica: int, *seconds: float) -> Report:
    return Report(
        replica=replica, running=1, waiting=0, kv_used=0, busy=0.5, version=0, training_steps=0, last_loss=None,
        serve_timings=tuple((1.0, 0.0, s) for s in seconds),
    )  # fmt: skip


SCATTERED = [0.001, 1.0, 9.0, 0.01] * 8


class Requests:
    """Requests at each replica, as many as `load` says when it is asked for."""

    def __init__(self, load: dict[int, int]) -> None:
        self.load = load

    def load_of(self, replica: int) -> tuple[int, int]:
        return self.load[replica], 0

    def take_changed(self) -> set[int]:
        return set(self.load)


def fleet_with(load: dict[int, int]) -> Fleet:
    """Two replicas. load: requests at each, read when it is asked for."""
    fleet = Fleet(CONFIG, 2, lambda *_: True, Requests(load), lambda *_: None)
    for replica in (0, 1):
        hello = Hello(
            replica=replica, rank=replica, host="h", pid=1, max_batch=4, kv_tokens=1000, max_context=500,
            vocabulary=300, adapter="", heldout_rows=0, dtype="float32", load_s=0.0,
        )  # fmt: skip
        fleet.join(0.0, hello)
    return fleet


def test_which_replicas_are_alive_and_serve_follows_every_change_of_their_states() -> None:
    fleet = fleet_with({0: 0, 1: 0})
    assert fleet.alive == fleet.serving == (0, 1)
    fleet.set_state(1.0, 0, ReplicaState.FAILED, "silent")
    assert fleet.alive == fleet.serving == (1,)
    fleet.set_state(1.0, 1, ReplicaState.IDLE, "slack")
    assert fleet.join(2.0, msgspec.structs.replace(fleet.hello_of(0), incarnation=1))
    assert fleet.alive == fleet.serving == (0, 1)


def test_serving_is_known_after_so_many_iterations_of_each_replica_however_they_scatter() -> None:
    fleet = fleet_with({0: 1, 1: 1})
    fleet.report(1.0, report(0, *SCATTERED))
    fleet.report(1.0, report(1, *SCATTERED[:-1]))
    assert not fleet.latency_known
    fleet.report(2.0, report(1, 0.5))
    assert fleet.latency_known


def test_a_replica_that_gets_no_requests_keeps_no_round_from_beginning() -> None:
    load = {0: 0, 1: 0}
    fleet = fleet_with(load)
    assert not fleet.latency_known, "nothing is known of anybody"
    fleet.report(1.0, report(0, *SCATTERED))
    assert fleet.latency_known
    load[1] = 1
    assert not fleet.latency_known
