"""What comes back for the requests of one call, as the task of that call awaits it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass

from msgspec.structs import replace

from clif.types import TokenEvent


class ClientLeft(Exception):
    """The connection of a call is gone: there is nothing to send any more."""


@dataclass(frozen=True)
class Restarted:
    """The answer to a request begins again: what came before it does not count."""

    request_id: int


Item = TokenEvent | Restarted


class Stream:
    """The events of the requests of one call, in order. Each request ends with an event that has a finish reason.

    open: the requests that have not ended. An error instead of events comes at once, and for all of them.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self.ids = tuple(ids)
        self.open = set(self.ids)
        self._items: list[Item] = []
        self._error: Exception | None = None
        self._wake = asyncio.Event()
        self._whole = self._nudged = False
        self._quiet = True

    @property
    def stopped(self) -> bool:
        """Whether an error has come, after which there are no events."""
        return self._error is not None

    def put(self, event: TokenEvent) -> None:
        self._items.append(event)
        self._quiet = False
        if event.finish is not None:
            self.open.discard(event.request_id)
        if not self._whole or not self.open:
            self._wake.set()

    def restart(self, request_id: int) -> None:
        """Events that are not read yet are gone; for those that are, the reader is told."""
        self._items = [item for item in self._items if getattr(item, "request_id", None) != request_id]
        self._items.append(Restarted(request_id))

    def stop(self, error: Exception) -> None:
        """End all that has not ended. The first error counts."""
        self._error = self._error or error
        self._wake.set()

    def nudge(self) -> None:
        """Wake the reader if no event has come since the last call."""
        if self._quiet:
            self._nudged = True
            self._wake.set()
        self._quiet = True

    async def batch(self) -> list[Item]:
        """The events that have come since the last call, one at least; none after nudge().

        Raises the error of stop().
        """
        while not (self._items or self._nudged):
            await self._next()
        self._raise()
        self._nudged = False
        items, self._items = self._items, []
        return items

    async def whole(self) -> list[Item]:
        """All events, once every request has ended: the task sleeps until then. Raises the error of stop()."""
        self._whole = True
        while self.open:
            await self._next()
        self._raise()
        return self._items

    async def _next(self) -> None:
        self._raise()
        self._wake.clear()
        await self._wake.wait()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def joined(items: Iterable[Item]) -> list[Item]:
    """The events of whole answers with one for each, which is decoded at once."""
    events: dict[int, list[TokenEvent]] = {}
    for item in items:
        if isinstance(item, Restarted):
            events.pop(item.request_id, None)
        else:
            events.setdefault(item.request_id, []).append(item)
    return [_join(found) for found in events.values()]


def _join(events: list[TokenEvent]) -> TokenEvent:
    if len(events) == 1:
        return events[0]
    # The last one may hold no tokens, and its version is then none.
    version = next((event.version for event in events if event.tokens), events[-1].version)
    return replace(
        events[-1],
        version=version,
        tokens=tuple(token for event in events for token in event.tokens),
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
        prompt_logprobs=next((event.prompt_logprobs for event in events if event.prompt_logprobs), ()),
    )


def first_tokens_first(events: Iterable[TokenEvent], waiting: Container[int]) -> list[TokenEvent]:
    """Events of requests without a token before all others, otherwise in their order.

    A client waits most for its first token, and the newest requests come last in a batch. waiting: their ids.
    """
    return sorted(events, key=lambda event: event.request_id not in waiting)


class Rate:
    """How often something happens, from the last times that it did."""

    def __init__(self, kept: int = 64) -> None:
        self._times: deque[float] = deque(maxlen=kept)

    def note(self, now: float) -> None:
        self._times.append(now)

    def per_s(self, now: float) -> float:
        """0 before the second time."""
        if len(self._times) < 2:
            return 0.0
        return (len(self._times) - 1) / max(now - self._times[0], 1e-3)
