"""Which requests each replica holds, and how much of its cache they may fill. Free of torch.

Invariant: `changed` names every replica whose load differs from what take_changed() last gave away, so that a view of
the cluster is brought up to date at the cost of what changed and not of how many replicas there are.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Generic, Protocol, TypeVar

from clif.types import Request


class HasRequest(Protocol):
    request: Request


R = TypeVar("R", bound=HasRequest)


class HeldRequests(Generic[R]):
    """Records by replica and request id."""

    def __init__(self) -> None:
        self._records: defaultdict[int, dict[int, R]] = defaultdict(dict)
        self._tokens: defaultdict[int, int] = defaultdict(int)
        self._changed: set[int] = set()

    def get(self, replica: int, request_id: int) -> R | None:
        return self._records[replica].get(request_id)

    def add(self, replica: int, record: R) -> None:
        self._records[replica][record.request.id] = record
        self._tokens[replica] += record.request.max_total_tokens
        self._changed.add(replica)

    def remove(self, replica: int, record: R) -> None:
        """Does nothing when the replica does not hold it."""
        if self._records[replica].pop(record.request.id, None) is not None:
            self._tokens[replica] -= record.request.max_total_tokens
            self._changed.add(replica)

    def remove_all(self, replica: int) -> list[R]:
        """What the replica held, which is empty now."""
        records = list(self._records.pop(replica, {}).values())
        self._tokens[replica] = 0
        self._changed.add(replica)
        return records

    def load_of(self, replica: int) -> tuple[int, int]:
        """(requests at the replica that have not ended, tokens that they may fill in its KV cache)."""
        return len(self._records[replica]), self._tokens[replica]

    def take_changed(self) -> set[int]:
        """Replicas whose load has changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed
