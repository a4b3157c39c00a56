"""The dispatcher: admits, queues, hands out and follows requests.

Invariant (promise 1): every request that submit() accepts gets exactly one terminal event, through _finish(). Later
events for it are counted and ignored.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from clif.config import Config
from clif.control.held import HeldRequests
from clif.control.policy.routing import Fail, PassOver, Reject, RoutingView, choose_replica
from clif.states import RequestState, advance
from clif.types import FinishReason, Purpose, Request, Slo, TokenEvent, Waiting, of_client
from clif.wire.messages import Cancel, Down, Submit

log = logging.getLogger(__name__)
Send = Callable[[int, Down], bool]


@dataclass(eq=False)
class RequestRecord:
    """A request from arrival to end. Stamps are seconds of the control process's clock; None: it has not happened."""

    request: Request
    arrival_s: float
    state: RequestState = RequestState.QUEUED
    replica: int | None = None
    dispatched_s: float | None = None
    finished_s: float | None = None
    version: int | None = None
    token_times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    detail: str = ""
    text: str | None = None
    unservable: bool = False
    """Rejected at submission because no replica can ever serve it: no sign of pressure."""
    failed_replicas: int = 0
    """How many replicas failed while they held it."""

    @property
    def first_token_s(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def ttft_s(self) -> float | None:
        return self.token_times[0] - self.arrival_s if self.token_times else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for fewer than two tokens."""
        times = self.token_times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens; tokens of one event have gaps of 0."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def e2e_s(self) -> float | None:
        return None if self.finished_s is None else self.finished_s - self.arrival_s

    @property
    def slo_met(self) -> bool:
        """Whether it was answered within every promised latency."""
        slo: Slo = self.request.slo
        pairs = ((self.ttft_s, slo.ttft_s), (self.tpot_s, slo.tpot_s), (self.e2e_s, slo.deadline_s))
        answered = self.finish in (FinishReason.STOP, FinishReason.LENGTH)
        return answered and all(took is None or promised is None or took <= promised for took, promised in pairs)


@dataclass(frozen=True)
class Hooks:
    """Called for each end of a request, each hand-over (record, predicted seconds, reason), and each event with tokens.

    A request of a failed replica may start over under another version: its record then holds only the new tokens.
    """

    finished: Callable[[RequestRecord], None]
    dispatched: Callable[[RequestRecord, float, str], None]
    tokens: Callable[[RequestRecord, TokenEvent], None] = lambda record, event: None
    ended: Callable[[RequestRecord, TokenEvent | None], None] = lambda record, event: None
    restarted: Callable[[RequestRecord], None] = lambda record: None


class Dispatcher:
    """Holds all requests that have not ended. The time is an argument of every call.

    context_limit: longest prompt plus answer, tokens. ignored_events: events for requests that had ended, or that their
    sender no longer holds.
    """

    def __init__(self, config: Config, send: Send, hooks: Hooks) -> None:
        self.context_limit = min(config.model.max_context, config.kv_tokens_bound)
        self.ignored_events = 0
        self._config = config
        self._send = send
        self._hooks = hooks
        self._records: dict[int, RequestRecord] = {}
        self._queue: deque[RequestRecord] = deque()
        self._states: Counter[RequestState] = Counter()
        self.held: HeldRequests[RequestRecord] = HeldRequests()

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._records)

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that have their first token and not yet their last."""
        return self._states[RequestState.RUNNING]

    def versions_waited_for(self) -> set[int]:
        """Versions that queued requests ask for, besides the base."""
        return {record.request.version for record in self._queue if record.request.version}

    def oldest_wait_s(self, now: float) -> float:
        """Age of the oldest user request without a first token; 0 if there is none."""
        waiting = (
            r.arrival_s for r in self._records.values() if not r.token_times and r.request.purpose is Purpose.USER
        )
        return max(0.0, now - min(waiting, default=now))

    def backlog(self, now: float, replicas: int, most: int) -> tuple[int, tuple[Waiting, ...]]:
        """Requests of users that wait, as the share of one of `replicas` if they take turns: how many, and the first
        `most` of the share, oldest first.
        """
        every = max(1, replicas)
        share = islice(self._queue, 0, every * most, every)
        oldest = tuple(waiting_of(now, record) for record in share if record.request.purpose is Purpose.USER)
        return -(-len(self._queue) // every) if oldest else 0, oldest

    def submit(self, now: float, request: Request, arrival_s: float | None = None) -> None:
        """Accept a request: it waits for a replica, or is rejected at once if no replica can ever serve it.

        arrival_s: when it arrived; by default now. Raises ValueError for an id that is still in use.
        """
        if request.id in self._records:
            raise ValueError(f"request id {request.id} is in use: ids must be unique")
        record = RequestRecord(request, now if arrival_s is None else arrival_s)
        self._records[request.id] = record
        self._states[record.state] += 1
        refusal = self._refusal(request)
        if refusal:
            record.unservable = True
            self._finish(now, record, FinishReason.REJECTED, refusal)
        else:
            self._queue.append(record)

    def dispatch(self, now: float, routing_view: Callable[[], RoutingView]) -> None:
        """Hand out queued requests, first come first served, until the first one has to wait for room.

        routing_view: all replicas as they are after the hand-over before.
        """
        passed_over: list[RequestRecord] = []
        while self._queue:
            record = self._queue[0]
            route, reason = choose_replica(now, record.request, record.arrival_s, routing_view(), self._config)
            if route is None:
                break
            if isinstance(route, PassOver):
                passed_over.append(self._queue.popleft())
                continue
            if isinstance(route, Reject | Fail):
                self._queue.popleft()
                finish = FinishReason.REJECTED if isinstance(route, Reject) else FinishReason.FAILED
                self._finish(now, record, finish, reason)
                continue
            order = Submit(request=record.request, output_ids=tuple(record.tokens), version=record.version)
            if not self._send(route.replica, order):
                # send() marks the replica as unreachable; the request keeps its position.
                break
            self._queue.popleft()
            self._hand_over(now, record, route.replica)
            self._hooks.dispatched(record, route.predicted_s, reason)
        self._queue.extendleft(reversed(passed_over))

    def held_by(self, replica: int, request_id: int) -> RequestRecord | None:
        """The request, or None if the replica does not hold it."""
        return self.held.get(replica, request_id)

    def on_event(self, now: float, replica: int, event: TokenEvent) -> None:
        """Take tokens or the end of a request from the replica that holds it. Claims have checked the event."""
        record = self.held_by(replica, event.request_id)
        if record is None:
            # The request was cancelled, moved away from a failed replica, or has ended already.
            self.ignored_events += 1
            log.debug("event for request %d of replica %d ignored", event.request_id, replica)
            return
        if event.tokens:
            if record.state is RequestState.DISPATCHED:
                self._begin(record, event.version)
            record.tokens.extend(event.tokens)
            record.token_times.extend([now] * len(event.tokens))
            self._hooks.tokens(record, event)
        if event.finish is not None:
            record.text = event.text
            self._finish(now, record, event.finish, event.detail, event)

    def _begin(self, record: RequestRecord, version: int) -> None:
        """First tokens from this replica. If its version differs from the failed replica's, the answer starts over."""
        if record.version != version:
            if record.tokens:
                self._hooks.restarted(record)
            record.tokens.clear()
            record.token_times.clear()
        record.version = version
        self._advance(record, RequestState.RUNNING)

    def cancel(self, now: float, request_id: int, detail: str = "") -> None:
        """Cancel a request, also at its replica. Does nothing if it ended already."""
        record = self._records.get(request_id)
        if record is None:
            return
        self._send_cancel(record)
        self._finish(now, record, FinishReason.CANCELLED, detail)

    def cancel_all(self, now: float, detail: str) -> int:
        """Cancel every request that has not ended; return their number."""
        ids = list(self._records)
        for request_id in ids:
            self.cancel(now, request_id, detail)
        return len(ids)

    def requeue(self, now: float, replica: int, reason: str) -> None:
        """Requeue a failed replica's requests at the front.

        A request that was held by more than `control.retries` failed replicas fails.
        """
        held = self.held.remove_all(replica)
        for record in sorted(held, key=lambda r: r.arrival_s, reverse=True):
            record.failed_replicas += 1
            if record.failed_replicas > self._config.control.retries:
                detail = f"{record.failed_replicas} replicas were lost with it, the last one {replica} ({reason})"
                self._finish(now, record, FinishReason.FAILED, detail)
            else:
                self._advance(record, RequestState.QUEUED)
                record.replica = record.dispatched_s = None
                self._queue.appendleft(record)

    def fail_all(self, now: float, reason: str, left: bool = False) -> None:
        """End every request that has not ended as failed, with the reason.

        left: those of the load are left to the next start, which answers them; probes and clients' requests are not.
        """
        for record in list(self._records.values()):
            if not left or record.request.purpose is Purpose.PROBE or of_client(record.request.id):
                self._finish(now, record, FinishReason.FAILED, reason)

    def cancel_clients(self, now: float, detail: str) -> None:
        """Cancel the requests of clients: their connections are gone."""
        for request_id in filter(of_client, list(self._records)):
            self.cancel(now, request_id, detail)

    def fail(self, now: float, request: Request, arrival_s: float, detail: str) -> None:
        """End a request that an earlier start accepted, and that this one cannot answer."""
        record = RequestRecord(request, arrival_s)
        self._records[request.id] = record
        self._states[record.state] += 1
        self._finish(now, record, FinishReason.FAILED, detail)

    def cancel_probes(self, now: float, detail: str) -> None:
        """Cancel the probes that have not ended: quality is no longer measured."""
        for request_id in [i for i, r in self._records.items() if r.request.purpose is Purpose.PROBE]:
            self.cancel(now, request_id, detail)

    def _refusal(self, request: Request) -> str:
        if not request.prompt:
            return "the prompt is empty: give at least one token"
        if request.max_total_tokens > self.context_limit:
            return (
                f"prompt {len(request.prompt)} + max_tokens {request.sampling.max_tokens} exceed {self.context_limit} "
                "tokens: shorten the prompt, lower max_tokens, or raise model.max_context and engine.kv_tokens"
            )
        return ""

    def _hand_over(self, now: float, record: RequestRecord, replica: int) -> None:
        self._advance(record, RequestState.DISPATCHED)
        record.replica, record.dispatched_s = replica, now
        self.held.add(replica, record)

    def _advance(self, record: RequestRecord, state: RequestState) -> None:
        self._states[record.state] -= 1
        record.state = advance(record.state, state)
        self._states[state] += 1

    def _send_cancel(self, record: RequestRecord) -> None:
        if record.replica is not None:
            self._send(record.replica, Cancel(request_id=record.request.id))

    def _finish(
        self, now: float, record: RequestRecord, finish: FinishReason, detail: str, event: TokenEvent | None = None
    ) -> None:
        if record.state is RequestState.QUEUED and record in self._queue:
            self._queue.remove(record)
        self._advance(record, RequestState.FINISHED)
        self._states[RequestState.FINISHED] -= 1
        record.finish, record.detail, record.finished_s = finish, detail, now
        del self._records[record.request.id]
        if record.replica is not None:
            self.held.remove(record.replica, record)
        self._hooks.finished(record)
        self._hooks.ended(record, event)


def waiting_of(now: float, record: RequestRecord) -> Waiting:
    request, asked = record.request, record.request.sampling.max_tokens
    wait_s = float(max(0.0, now - record.arrival_s))
    return Waiting(request.id, wait_s, len(request.prompt), asked, request.slo)
