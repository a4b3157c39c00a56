"""Sends planned requests to a server and measures the answers.

The load is open: a request is sent at its planned time, whether or not earlier ones were answered. Every latency counts
from the planned time, so that a server which holds requests up cannot hide that by delaying the next ones.

Sources: Schroeder, Wierman, Harchol-Balter, "Open Versus Closed: A Cautionary Tale" (NSDI 2006); Tene, "How NOT to
Measure Latency" (coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from clif.clients.endpoint import CONNECT_S, Endpoint
from clif.clients.load_plan import Planned
from clif.clients.stream import DONE, Events, StreamError, chunk_of

BEGIN_S = 0.1
"""The first planned time lies this far ahead, so that no request is late already."""


@dataclass
class Outcome:
    """What became of a planned request. Stamps: seconds after the start of the test. error: empty for a whole answer.

    sent_s: when it was sent; late where the client is too slow, or waited for --concurrency (held_back). deltas: stamps
    of the events with text. tokens: those of the answer, as the server counts them, otherwise events with text.
    """

    planned_s: float
    sent_s: float | None = None
    ended_s: float | None = None
    held_back: bool = False
    deltas: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str = ""
    detail: str = ""

    @property
    def tokens(self) -> int:
        return len(self.deltas) if self.completion_tokens is None else self.completion_tokens

    @property
    def ttft_s(self) -> float | None:
        return self.deltas[0] - self.planned_s if self.deltas else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for fewer than two."""
        return (self.deltas[-1] - self.deltas[0]) / (self.tokens - 1) if self.deltas and self.tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between events with text; an event may hold several tokens."""
        return [b - a for a, b in zip(self.deltas, self.deltas[1:], strict=False)]

    @property
    def e2e_s(self) -> float | None:
        return None if self.ended_s is None or self.error else self.ended_s - self.planned_s


@dataclass
class LoadTest:
    """One load test. options: further fields of each request. concurrency: most requests that are open at a time; None:
    as many as the plan asks for. silent_s: without a byte for so long, an answer is given up.
    """

    endpoint: Endpoint
    model: str
    options: dict[str, object] = field(default_factory=dict)
    concurrency: int | None = None
    silent_s: float = 300.0
    clock: Callable[[], float] = time.monotonic
    outcomes: list[Outcome] = field(default_factory=list)
    _start_s: float = 0.0

    async def run(self, plan: Sequence[Planned]) -> list[Outcome]:
        """Send all of the plan and wait for the answers. A cancellation leaves the outcomes so far in `outcomes`."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self.silent_s, connect=CONNECT_S, pool=None)
        self._start_s = self.clock() + BEGIN_S
        slots = asyncio.Semaphore(self.concurrency or max(1, len(plan)))
        async with httpx.AsyncClient(limits=limits, timeout=timeout, headers=self.endpoint.headers) as client:
            tasks = []
            try:
                for planned in plan:
                    await asyncio.sleep(max(0.0, self._start_s + planned.at_s - self.clock()))
                    self.outcomes.append(Outcome(planned.at_s))
                    tasks.append(asyncio.create_task(self._one(client, slots, planned, self.outcomes[-1])))
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return self.outcomes

    @property
    def _now(self) -> float:
        return self.clock() - self._start_s

    async def _one(
        self, client: httpx.AsyncClient, slots: asyncio.Semaphore, planned: Planned, outcome: Outcome
    ) -> None:
        outcome.held_back = slots.locked()
        outcome.error = "interrupted"
        async with slots:
            outcome.sent_s = self._now
            try:
                await self._stream(client, planned, outcome)
            except httpx.ConnectError as error:
                outcome.error, outcome.detail = "no connection", str(error)
            except httpx.TimeoutException as error:
                outcome.error, outcome.detail = "timeout", type(error).__name__
            except httpx.HTTPError as error:
                outcome.error, outcome.detail = "broken connection", str(error) or type(error).__name__
            except StreamError as error:
                outcome.error, outcome.detail = "bad stream", str(error)
            outcome.ended_s = self._now

    async def _stream(self, client: httpx.AsyncClient, planned: Planned, outcome: Outcome) -> None:
        body = {
            "model": self.model,
            "messages": planned.messages,
            "max_tokens": planned.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }
        async with client.stream("POST", f"{self.endpoint.url}/chat/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                outcome.error, outcome.detail = f"HTTP {answer.status_code}", (await answer.aread())[:500].decode()
                return
            whole = await self._read(answer, outcome)
        outcome.error = "" if whole else "broken connection"

    async def _read(self, answer: httpx.Response, outcome: Outcome) -> bool:
        """Take the events in; whether the answer is whole."""
        events, ended = Events(), False
        async for piece in answer.aiter_bytes():
            now = self._now
            for data in events.feed(piece):
                if data == DONE:
                    return True
                chunk = chunk_of(data)
                ended = ended or chunk.ended
                if chunk.text:
                    outcome.deltas.append(now)
                if chunk.usage is not None:
                    outcome.prompt_tokens = chunk.usage.prompt_tokens
                    outcome.completion_tokens = chunk.usage.completion_tokens
        return ended


def run_load_test(test: LoadTest, plan: Sequence[Planned]) -> list[Outcome]:
    """Run it to its end, or until Ctrl-C: then what was measured so far counts, and open requests as interrupted."""
    with suppress(KeyboardInterrupt):
        asyncio.run(test.run(plan))
    return test.outcomes
