"""Counts of a run since its control process began, as Prometheus wants them: they only grow. Free of torch."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from clif.control.dispatcher import RequestRecord
from clif.control.rounds import Round
from clif.types import FinishReason, TokenEvent

FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Upper bounds of the buckets: vLLM's, with smaller ones where a small model is faster than all of them."""
VERSIONS_COUNTED = 256


class Histogram:
    """Counts of values by bucket. bounds: upper bounds, ascending; one more bucket holds what is above them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_all(self, values: Iterable[float]) -> None:
        for value in values:
            self.add(value)

    def body(self) -> dict[str, Any]:
        return {"bounds": self.bounds, "counts": self.counts, "sum": round(self.sum, 6)}


@dataclass
class Answered:
    """What a version answered. requests: of users that ended; tokens: of their answers."""

    requests: int = 0
    tokens: int = 0
    slo_met: int = 0


@dataclass
class Totals:
    """Counts over the users' requests and the rounds of this start.

    prompt_tokens and latencies, but queue_s: of requests that got a first token. generated_tokens: as they come, also
    those of an answer that began again. trained_tokens, trained_samples: of rounds that ended, of all members.
    versions: by number, the latest.
    """

    requests: Counter[FinishReason] = field(default_factory=Counter)
    slo_met: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    ttft_s: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_S))
    itl_s: Histogram = field(default_factory=lambda: Histogram(TOKEN_S))
    e2e_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_S))
    queue_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_S))
    rounds: Counter[str] = field(default_factory=Counter)
    trained_tokens: int = 0
    trained_samples: int = 0
    versions: dict[int, Answered] = field(default_factory=dict)

    def tokens(self, event: TokenEvent) -> None:
        """Tokens of a user's answer."""
        self.generated_tokens += len(event.tokens)

    def request(self, record: RequestRecord) -> None:
        """A user's request has ended."""
        assert record.finish is not None
        self.requests[record.finish] += 1
        self.slo_met += record.slo_met
        if record.dispatched_s is not None:
            self.queue_s.add(max(0.0, record.dispatched_s - record.arrival_s))
        if record.ttft_s is None or record.e2e_s is None:
            return
        self.e2e_s.add(record.e2e_s)
        self.prompt_tokens += len(record.request.prompt)
        self.ttft_s.add(record.ttft_s)
        self.itl_s.add_all(record.gaps_s)
        self._of_version(record.version or 0, record)

    def round(self, ended: Round) -> None:
        self.rounds[ended.state.value] += 1
        self.trained_tokens += sum(result.tokens for result in ended.results.values())
        self.trained_samples += sum(result.samples for result in ended.results.values())

    def body(self) -> dict[str, Any]:
        """As JSON takes it; what each version answered is left to the list of versions."""
        return {
            "requests": {reason.value: self.requests[reason] for reason in FinishReason},
            "slo_met": self.slo_met,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "rounds": {state: self.rounds[state] for state in ("committed", "discarded")},
            "trained_tokens": self.trained_tokens,
            "trained_samples": self.trained_samples,
            "ttft_s": self.ttft_s.body(),
            "itl_s": self.itl_s.body(),
            "e2e_s": self.e2e_s.body(),
            "queue_s": self.queue_s.body(),
        }

    def _of_version(self, version: int, record: RequestRecord) -> None:
        answered = self.versions.get(version)
        if answered is None:
            answered = self.versions[version] = Answered()
            if len(self.versions) > VERSIONS_COUNTED:
                # Version 0, the base model, stays.
                del self.versions[min(number for number in self.versions if number)]
        answered.requests += 1
        answered.tokens += len(record.token_times)
        answered.slo_met += record.slo_met
