"""Promise 2 as a state machine: whatever the order of events, no version is taken from its readers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from clif.adapters.slots import SlotTable

SLOTS = 3


class Slots(RuleBasedStateMachine):
    """contents: which version's weights lie in each physical slot, as fill_slot would have left them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.contents, self.readers, self.newest = SlotTable(SLOTS), {}, [], 0
        self.active, self.wanted = 0, set()

    @rule()
    def start(self):
        version = self.table.acquire()
        assert version == self.table.active
        self.readers.append((version, self.table.slot_of(version)))

    @precondition(lambda self: self.readers)
    @rule()
    def go_on(self):
        """A request of a lost replica, which had read what the oldest reader here reads."""
        version, slot = self.readers[0]
        assert self.table.holds(version) and self.table.acquire(version) == version
        self.readers.append((version, slot))

    @rule()
    def go_on_with_the_base(self):
        assert self.table.holds(0) and self.table.acquire(0) == 0
        self.readers.append((0, None))

    @precondition(lambda self: self.readers)
    @rule()
    def finish_oldest(self):
        self.table.release(self.readers.pop(0)[0])

    @precondition(lambda self: self.readers)
    @rule()
    def finish_newest(self):
        self.table.release(self.readers.pop()[0])

    @rule()
    def promote(self):
        slot = self.free_slot()
        if slot is not None:
            self.newest += 1
            self.contents[slot] = self.active = self.newest
            self.table.promote(self.newest, slot)

    def free_slot(self):
        slot = self.table.free_slot()
        if slot is None:
            held = {self.table.slot_of(v) for v in (self.active, *(v for v, _ in self.readers), *self.table.held)}
            assert set(range(SLOTS)) <= held, "a promotion waits only while every slot is read, kept or active"
        return slot

    @rule()
    def load(self):
        """A version that is kept and answers those who ask for it."""
        slot = self.free_slot()
        if slot is not None:
            self.newest += 1
            self.wanted.add(self.newest)
            self.table.keep(self.wanted)
            self.contents[slot] = self.newest
            self.table.load(self.newest, slot)

    @rule(versions=st.frozensets(st.integers(1, 8)))
    def keep(self, versions):
        self.wanted = set(versions)
        self.table.keep(versions)

    @rule(data=st.data())
    def activate(self, data):
        """Back, or forth, to a version that is held."""
        self.active = data.draw(st.sampled_from([0, *self.table.held]))
        self.table.activate(self.active)

    @precondition(lambda self: self.table.held)
    @rule(data=st.data())
    def start_pinned(self, data):
        version = data.draw(st.sampled_from(self.table.held))
        assert self.table.acquire(version) == version
        self.readers.append((version, self.table.slot_of(version)))

    @invariant()
    def readers_keep_their_weights(self):
        for version, slot in self.readers:
            assert self.table.slot_of(version) == slot
            assert slot is None or self.contents[slot] == version

    @invariant()
    def only_read_versions_retire(self):
        assert self.table.active == self.active
        stays = {self.active, *self.wanted}
        assert set(self.table.retiring) == {v for v, _ in self.readers if v not in stays}

    @invariant()
    def what_is_held_is_active_or_kept(self):
        assert set(self.table.held) <= {self.active, *self.wanted}
        assert self.active in (0, *self.table.held)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_wrong_uses_are_errors():
    table = SlotTable(2)
    with pytest.raises(RuntimeError, match="no reader to release"):
        table.release(0)
    table.promote(1, 0)
    with pytest.raises(RuntimeError, match="held already"):
        table.promote(1, 1)
    with pytest.raises(RuntimeError, match="not held: it cannot become active"):
        table.activate(7)
    with pytest.raises(RuntimeError, match="still read"):
        table.promote(2, 0)
