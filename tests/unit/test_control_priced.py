"""When the control process knows what serving takes, so that rounds may begin beside it."""

from __future__ import annotations

from clif.config import config_from_tree
from clif.control.fleet import Fleet
from clif.wire.messages import Hello, Report

CONFIG = config_from_tree({"model": {"path": "m"}, "data": {"path": __file__}})


def report(replica: int, *seconds: float) -> Report:
    return Report(
        replica=replica, running=1, waiting=0, kv_used=0, busy=0.5, version=0, training_steps=0, last_loss=None,
        serve_samples=tuple((1.0, 0.0, s) for s in seconds),
    )  # fmt: skip


def test_serving_is_known_after_so_many_iterations_of_each_replica_however_they_scatter() -> None:
    fleet = Fleet(CONFIG, 2, lambda *_: True, lambda _: (0, 0), lambda *_: None)
    for replica in (0, 1):
        hello = Hello(
            replica=replica, rank=replica, host="h", pid=1, max_batch=4, kv_tokens=1000, max_context=500,
            vocabulary=300, adapter="", heldout_rows=0, dtype="float32", load_s=0.0,
        )  # fmt: skip
        fleet.join(0.0, hello)
    scattered = [0.001, 1.0, 9.0, 0.01] * 8
    fleet.report(1.0, report(0, *scattered))
    fleet.report(1.0, report(1, *scattered[:-1]))
    assert not fleet.priced
    fleet.report(2.0, report(1, 0.5))
    assert fleet.priced
