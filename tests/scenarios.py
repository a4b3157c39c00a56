"""Requests and what happens around them: the same for plain and captured steps, normal and overlapped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import Rig, answer, make_rig, request

from clif.types import Request, TokenEvent

RECORDED = Path(__file__).parent / "unit" / "recorded_answers.json"
SYSTEM = list(range(30, 51))
PROMPTS = [[7, 3, 9], [11, 5, 8, 2, 40, 41, 17], [5], list(range(20, 75)), [33, 34], [9, 9, 9, 1, 2, 3, 4, 5, 6]]
DRAWN = {"temperature": 0.9, "top_p": 0.9, "top_k": 50}


@dataclass
class Scenario:
    """Requests and what happens around them, by step: arrivals (request id -> step), promotions and cancellations."""

    requests: list[Request]
    engine: dict[str, Any] = field(default_factory=dict)
    arrive: dict[int, int] = field(default_factory=dict)
    promote: dict[int, int] = field(default_factory=dict)
    cancel: dict[int, int] = field(default_factory=dict)
    preempts: bool = False
    reuses: bool = False

    def run(self, model: str, **engine: Any) -> dict[int, list[TokenEvent]]:
        """Events of each request; checks that nothing is held afterwards."""
        rig = self.make(model, {**self.engine, **engine})
        events: dict[int, list[TokenEvent]] = {r.id: [] for r in self.requests}
        for step in range(2000):
            for event in self.act(rig, step):
                events[event.request_id].append(event)
            if step > max(self.arrive.values(), default=0) and not rig.engine.serving:
                break
        scheduler = rig.engine.scheduler
        assert scheduler.pool.used_tokens == 0 and rig.slots.retiring == () and not rig.engine.serving
        assert (scheduler.preemptions > 0) == self.preempts and (scheduler.reused_tokens > 0) == self.reuses
        return events

    def make(self, model: str, engine: dict[str, Any]) -> Rig:
        return make_rig(model, engine=engine)

    def act(self, rig: Rig, step: int) -> list[TokenEvent]:
        scheduler, ends = rig.engine.scheduler, []
        for r in self.requests:
            if self.arrive.get(r.id, 0) == step:
                scheduler.add(r, rig.engine.clock())
        for id in (id for id, at in self.cancel.items() if at == step):
            ends.append(scheduler.cancel(id))
        for version in (version for version, at in self.promote.items() if at == step):
            rig.fill(version, seed=version)
        return [*(end for end in ends if end is not None), *rig.engine.serve()]


def crowd(tokens: int) -> list[Request]:
    greedy = [request(i, [60 + i, *range(7 * i, 9 * i + 3)], max_tokens=tokens, ignore_eos=True) for i in range(6)]
    return [*greedy, *(request(i, [5, 6, i], max_tokens=tokens, seed=i, ignore_eos=True, **DRAWN) for i in range(6, 9))]


SCENARIOS = {
    "greedy, stop tokens and lengths": Scenario(
        [request(i, p, max_tokens=30 + i) for i, p in enumerate(PROMPTS)], arrive={i: 2 * i for i in range(6)}
    ),
    "drawn beside greedy": Scenario(
        [request(i, p, max_tokens=25, **(DRAWN if i % 2 else {}), seed=40 + i) for i, p in enumerate(PROMPTS)],
        arrive={i: 3 * i for i in range(6)},
    ),
    "ends at once": Scenario([request(i, p, max_tokens=1) for i, p in enumerate(PROMPTS)]),
    "preemption": Scenario(crowd(60), {"kv_tokens": 256, "max_batch": 9}, preempts=True),
    "prefix hits across promotions": Scenario(
        [request(i, [*SYSTEM, 7 + i % 3, *[9] * (i % 4)], max_tokens=20, ignore_eos=True) for i in range(10)],
        arrive={i: 4 * i for i in range(10)},
        promote={1: 18, 2: 30},
        reuses=True,
    ),
    "promotion under running requests": Scenario(
        [request(i, PROMPTS[i], max_tokens=30, ignore_eos=True, **(DRAWN if i == 3 else {})) for i in range(6)],
        arrive={2: 10, 3: 20, 4: 20, 5: 21},
        promote={1: 5, 2: 15},
    ),
    "cancellation": Scenario(
        [request(i, p, max_tokens=30, ignore_eos=True) for i, p in enumerate(PROMPTS)], cancel={1: 12, 3: 1, 5: 20}
    ),
}


def outcome(events: dict[int, list[TokenEvent]]) -> dict[str, Any]:
    """What a client receives for each request: versions, tokens, end."""
    return {
        str(i): [sorted({e.version for e in got if e.tokens}), answer(got), got[-1].finish] for i, got in events.items()
    }


def recorded(model: str, name: str, overlap: bool) -> dict[str, Any]:
    """The outcome of a scenario as the engine had it before its steps were cut in four.

    With overlap a request that is cancelled between launch and settle ends a token earlier.
    """
    expected: dict[str, Any] = json.loads(RECORDED.read_text())[model][name]
    for id in SCENARIOS[name].cancel if overlap else ():
        versions, tokens, finish = expected[str(id)]
        expected[str(id)] = [versions if tokens[:-1] else [], tokens[:-1], finish]
    return expected
