"""Promise 2 as a state machine: whatever the order of events, no version is taken from its readers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from clif.adapters.slots import SlotTable

SLOTS = 2


class Slots(RuleBasedStateMachine):
    """contents: which version's weights lie in each physical slot, as fill_slot would have left them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.contents, self.readers, self.newest = SlotTable(SLOTS), {}, [], 0

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
        slot = self.table.free_slot()
        if slot is None:
            held = {slot for _, slot in self.readers} | {self.table.slot_of(self.table.active)}
            assert set(range(SLOTS)) <= held, "a promotion waits only while every slot is read or active"
            return
        self.newest += 1
        self.contents[slot] = self.newest
        self.table.promote(self.newest, slot)

    @invariant()
    def readers_keep_their_weights(self):
        for version, slot in self.readers:
            assert self.table.slot_of(version) == slot
            assert slot is None or self.contents[slot] == version

    @invariant()
    def only_read_versions_retire(self):
        assert set(self.table.retiring) == {v for v, _ in self.readers if v != self.table.active}
        assert self.table.active == self.newest


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
