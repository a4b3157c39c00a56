"""The process groups of federated rounds: made on first use, reused, and closed if a collective in them may hang.

Invariant: a number stands for one group. A rank that retires a group never joins one under its number again.
"""

from __future__ import annotations

import datetime
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from clif.distributed.collectives import Group, make_group
from clif.types import GROUPS_KEPT, Members

POLL_S = 0.01


@dataclass
class _Entry:
    """A group, made or in the making. given_up: the rank no longer waits for it."""

    number: int
    made: Future[Group] = field(default_factory=Future)
    given_up: threading.Event = field(default_factory=threading.Event)


class RoundGroups:
    """Groups of one rank, by member set, in the order of their last use."""

    def __init__(
        self, rank: int, backend: str, store: dist.Store, device: torch.device, timeout: datetime.timedelta
    ) -> None:
        self._rank, self._backend, self._store = rank, backend, store
        self._device, self._timeout = device, timeout
        self._entries: dict[Members, _Entry] = {}

    def get(self, members: Members, ranks: tuple[int, ...], number: int) -> Future[Group]:
        """The group of this number over these ranks.

        A thread of its own makes it, as a member may be late or fail before it arrives. A group of the same members
        with another number is closed, and so is the least recently used one if there are too many.
        """
        entry = self._entries.pop(members, None)
        if entry is not None and entry.number != number:
            _close(entry)
            entry = None
        self._entries[members] = entry or self._make(number, ranks)
        while len(self._entries) > GROUPS_KEPT:
            self.retire(next(iter(self._entries)))
        return self._entries[members].made

    def retire(self, members: Members) -> None:
        """Never use this member set's group again."""
        entry = self._entries.pop(members, None)
        if entry is not None:
            _close(entry)

    def retire_all(self) -> None:
        for members in list(self._entries):
            self.retire(members)

    def _make(self, number: int, ranks: tuple[int, ...]) -> _Entry:
        entry, name = _Entry(number), f"clif/combined/{number}/{'-'.join(map(str, ranks))}"
        # A copy of the store (torch's stubs lack clone): a thread that waits in a store blocks all its other users.
        store = self._store.clone()  # type: ignore[attr-defined]

        def make() -> None:
            try:
                entry.made.set_result(self._meet(store, name, ranks, entry.given_up))
            except Exception as error:  # noqa: BLE001 - a thread cannot raise: result() does, in the loop's thread
                # Without the frames, which hold the copy of the store and its connection.
                entry.made.set_exception(error.with_traceback(None))

        threading.Thread(target=make, name=name, daemon=True).start()
        return entry

    def _meet(self, store: dist.Store, name: str, ranks: tuple[int, ...], given_up: threading.Event) -> Group:
        if self._device.type == "cuda":
            # The current GPU is a property of the thread.
            torch.cuda.set_device(self._device)
        # The rendezvous is done here, because the backend's own cannot be interrupted.
        store.set(f"{name}/here/{self._rank}", "")
        deadline = time.monotonic() + self._timeout.total_seconds()
        while missing := [r for r in ranks if not store.check([f"{name}/here/{r}"])]:
            if given_up.wait(POLL_S):
                raise RuntimeError(f"{name}: given up before ranks {missing} came")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: ranks {missing} did not come within {self._timeout.total_seconds():g} s")
        return make_group(self._backend, store, name, ranks.index(self._rank), len(ranks), self._timeout)


def _close(entry: _Entry) -> None:
    """Close a group now, or as soon as it is made."""
    entry.given_up.set()
    entry.made.add_done_callback(lambda made: None if made.exception() else made.result().close())
