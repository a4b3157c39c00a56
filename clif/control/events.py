"""The latest events of a run, for those who watch it: changes of states and pressure, rounds, versions, operators."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

KEPT = 64
LONGEST = 400


@dataclass(frozen=True)
class Event:
    """number: from 1, without gaps, so that a reader knows what it missed. at_s: a stamp of the server's clock.

    kind: state, pressure, round, version or operator. fields: what the text says, for programs.
    """

    number: int
    at_s: float
    kind: str
    text: str
    fields: dict[str, Any]


class Events:
    """A bounded list. The tables of the run hold all of it."""

    def __init__(self) -> None:
        self._latest: deque[Event] = deque(maxlen=KEPT)
        self._next = 1

    def add(self, now: float, kind: str, text: str, **fields: Any) -> None:
        self._latest.append(Event(self._next, now, kind, text[:LONGEST], fields))
        self._next += 1

    def body(self, now: float, unix: float) -> list[dict[str, Any]]:
        """Oldest first. unix: the wall clock at now."""
        return [
            {
                "number": event.number,
                "unix": round(unix - (now - event.at_s), 2),
                "kind": event.kind,
                "text": event.text,
                **event.fields,
            }
            for event in self._latest
        ]
