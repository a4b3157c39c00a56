"""Promise 6: what was committed is one fact in one place. No kill makes a round count that was not, or count twice."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

import clif.adapters.store
from clif.adapters.store import AdapterStore, Canary
from clif.control.durability.journal import Line, RoundBegan, RoundStored, VersionGiven
from clif.control.durability.recovery import Recorded, add_up, recover
from clif.errors import InputError
from clif.training.checkpoint import Checkpoint, CheckpointWriter, find_checkpoint
from clif.types import AdapterVersion


class Killed(Exception):
    """Stands for a kill: what was to come does not happen."""


def version(number: int, round_id: int) -> AdapterVersion:
    return AdapterVersion(number=number, round_id=round_id, heldout_loss=1.0)


def write(store: AdapterStore, number: int, round_id: int, dies_before: str = "") -> None:
    """Store a version; the process dies before it calls this function of os or of the store's module."""

    def die(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        if dies_before:
            owner = clif.adapters.store if hasattr(clif.adapters.store, dies_before) else clif.adapters.store.os
            patch.setattr(owner, dies_before, die)
        store.write(version(number, round_id), "{}", b"weights")


@pytest.mark.parametrize("moment", ["rename", "write_atomic", "replace"])
def test_a_folder_that_a_killed_process_left_is_not_counted_when_a_later_version_becomes_current(tmp_path, moment):
    store = AdapterStore(tmp_path)
    write(store, 1, round_id=1)
    with pytest.raises(Killed):
        write(store, 2, round_id=2, dies_before=moment)
    write(store, 3, round_id=3)
    assert store.rounds() == {1, 3} and store.rounds(last=1) == {1} and store.current() == version(3, 3)


def test_the_next_start_removes_what_was_never_committed_and_nothing_else(tmp_path):
    store = AdapterStore(tmp_path)
    store.sweep()
    write(store, 1, round_id=1)
    for number, moment in ((2, "write_atomic"), (3, "rename")):
        with pytest.raises(Killed):
            write(store, number, round_id=number, dies_before=moment)
    store.sweep()
    assert sorted(path.name for path in store.folder.iterdir()) == ["current.json", "v0001"]
    assert store.weights(1) == b"weights"


def test_the_prepared_checkpoint_of_a_round_that_a_kill_kept_from_being_committed_is_never_taken(tmp_path):
    store, cpu = AdapterStore(tmp_path), torch.device("cpu")
    write(store, 1, round_id=1)
    with pytest.raises(Killed):
        write(store, 2, round_id=2, dies_before="write_atomic")
    write(store, 3, round_id=3)
    writer = CheckpointWriter(tmp_path, 0)
    trainer = {"shadow": torch.zeros(2), "moments": {}, "steps": 0}
    writer.prepare(Checkpoint(2, 2, trainer, {}))
    writer.wait()
    assert find_checkpoint(writer, store.rounds(), cpu) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2, "committed": []}', '{"version": 1}', "\x00\x00"])
def test_a_damaged_current_file_is_named_with_what_can_be_done(tmp_path, text):
    store = AdapterStore(tmp_path)
    store.folder.mkdir()
    (store.folder / "current.json").write_text(text)
    with pytest.raises(InputError, match=r"current\.json is damaged .*Restore it, or start a new run"):
        store.rounds()


def test_a_file_of_before_there_were_several_adapters_is_read_and_its_last_version_is_active(tmp_path):
    store = AdapterStore(tmp_path)
    store.folder.mkdir()
    committed = [{"number": n, "round_id": n, "heldout_loss": 1.0} for n in (1, 2)]
    (store.folder / "current.json").write_text(json.dumps({"version": 2, "committed": committed}))
    assert store.current() == version(2, 2) and store.rounds() == {1, 2}
    stored = store.read()
    assert (stored.active, stored.pinned, stored.canary) == ({"clif": 2}, (), None)


def test_a_version_that_was_loaded_meanwhile_stays_when_a_round_of_a_lower_number_is_stored(tmp_path):
    store = AdapterStore(tmp_path)
    write(store, 1, round_id=1)
    loaded = AdapterVersion(number=3, round_id=0, heldout_loss=None, adapter="support")
    store.write(loaded, "{}", b"weights")
    write(store, 2, round_id=2)
    assert [known.number for known in store.committed()] == [1, 2, 3] and store.loaded() == (loaded,)
    assert store.read().active == {"clif": 2, "support": 3} and store.rounds() == {1, 2}


@pytest.mark.parametrize("moment", ["write_atomic", "replace"])
def test_a_rollback_survives_a_kill(tmp_path, moment):
    """It is there as a whole, or not at all; the versions are there in any case."""
    store = AdapterStore(tmp_path)
    for number in (1, 2):
        write(store, number, round_id=number)
    chosen = structs.replace(store.read(), active={"clif": 1}, pinned=(2,), canary=Canary(2, 0.1))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        owner = clif.adapters.store if moment == "write_atomic" else clif.adapters.store.os
        patch.setattr(owner, moment, lambda *_: (_ for _ in ()).throw(Killed))
        store.choose(chosen)
    assert AdapterStore(tmp_path).current() == version(2, 2)
    store.choose(chosen)
    again = AdapterStore(tmp_path)
    again.sweep()
    assert again.read() == chosen and again.current() == version(1, 1)
    write(again, 3, round_id=3)
    assert again.read() == structs.replace(chosen, committed=again.committed(), active={"clif": 3})


@dataclass
class Run:
    """A run's rounds over several starts, each step of a commit in the order of the real one."""

    store: AdapterStore
    lines: list[Line] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    served: set[int] = field(default_factory=set)

    def start(self, steps: int) -> None:
        """One process that dies after so many steps."""
        self.store.sweep()
        found = recover(add_up(self.lines), (), True, self.store.rounds(), Recorded(rounds=frozenset(self.rows)))
        self.rows += [stored.round_id for stored in found.unrecorded_rounds]
        round_id, number = found.last_round, found.last_version
        while True:
            round_id, number = round_id + 1, number + 1
            row = RoundStored(round_id=round_id, version=number, heldout_loss=1.0, row={"samples": 8})
            for step in (
                lambda r=round_id: self.lines.append(RoundBegan(round_id=r)),
                lambda n=number: self.lines.append(VersionGiven(version=n)),
                lambda line=row: self.lines.append(line),
                lambda n=number, r=round_id: self._die_renamed(n, r),
                lambda n=number, r=round_id: self._commit(n, r),
                lambda r=round_id: self.rows.append(r),
            ):
                if not steps:
                    return
                steps -= 1
                step()

    def _die_renamed(self, number: int, round_id: int) -> None:
        with pytest.raises(Killed):
            write(self.store, number, round_id, dies_before="write_atomic")

    def _commit(self, number: int, round_id: int) -> None:
        write(self.store, number, round_id)
        self.served.add(round_id)


@settings(deadline=None, max_examples=25)
@given(lives=st.lists(st.integers(0, 15), max_size=6))
def test_whenever_it_is_killed_and_however_often_it_starts_each_committed_round_has_one_row(tmp_path_factory, lives):
    run = Run(AdapterStore(tmp_path_factory.mktemp("run")))
    for steps in [*lives, 6, 0]:
        run.start(steps)
    assert sorted(run.rows) == sorted(run.served) == sorted(run.store.rounds())
