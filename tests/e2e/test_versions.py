"""A run under torchrun that goes on from what an operator chose, also after a kill."""

from __future__ import annotations

import signal

import h5py
import msgspec
import pytest
from launched import Launched, accepted_ids

from clif.adapters.store import AdapterStore


@pytest.mark.slow
def test_a_rollback_survives_a_kill_and_the_next_round_trains_from_it(tmp_path):
    """About 30 s: three starts of two ranks."""
    short = ("load.duration_s=1", "load.rate_rps=4", "load.max_tokens=8", "adapter.serving_slots=5")
    first = Launched(tmp_path, *short, "federation.rounds=2")
    assert first.end() == 0, first.say()
    store, before = AdapterStore(first.run_dir), set(accepted_ids(first.run_dir))
    assert [version.number for version in store.committed()] == [1, 2]
    store.choose(msgspec.structs.replace(store.read(), active={"clif": 1}))
    run = Launched(tmp_path, *short, "federation.rounds=1", "run.resume=true")
    run.wait_until("baseline: gather is through", times=2)
    run.control().send_signal(signal.SIGKILL)
    assert run.end() == 0, run.say()
    third = store.committed()[-1]
    assert (third.number, third.parent) == (3, 1) and store.read().active == {"clif": 3}
    with h5py.File(run.run_dir / "run.h5") as file:
        rows = file["requests"][:]
    answered = {row["version"].item() for row in rows if row["purpose"] == b"user" and row["id"] not in before}
    assert 1 in answered and answered <= {1, 3}
