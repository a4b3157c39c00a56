"""A replica that answers with a fixed text, at times drawn from a measured run. Free of torch.

The scheduler is the real one: batches, blocks of the KV cache, preemption, versions, limits and cancellations are those
of a replica. Only the computation is replaced by waiting. Of what a request asks of its tokens, max_tokens and stop
strings count; log-probabilities are made up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from clif.adapters.slots import SlotTable
from clif.config import Config
from clif.emulated.member import STEP_S, EmulatedMember
from clif.emulated.step_times import StepTimes
from clif.engine.scheduler import Chunk, Scheduler
from clif.engine.scheduler import Sequence as Running
from clif.engine.step_record import StepRecord
from clif.replica.records import RankRecords
from clif.tokenizer import ChatTokenizer
from clif.types import Regime, Request, TokenEvent, TokenLogprob
from clif.wire import messages as m
from clif.wire.channels import decode_down

log = logging.getLogger(__name__)
TEXT = (
    "This answer is made up: the engine is emulated, so no model has read the question. It is the same text for each "
    "request, as long as was asked for, and its tokens come at the times that a real engine would take. "
)
POLLS_S = 0.0015
"""A step that ends within this time is waited for by sleeping: sockets are polled by the millisecond."""
TIMINGS = 64
"""Step times of one report: fits need no more of them."""


class Watch:
    """What a benchmark is told of all replicas of a process, with stamps of time.monotonic. Nothing by default."""

    def submitted(self, now: float, request: Request) -> None:
        """A request has come."""

    def sent(self, now: float, events: Sequence[TokenEvent]) -> None:
        """The events of a step are about to be sent."""


def text_ids(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """The tokens that every answer consists of, without those that would end it."""
    return tuple(id for id in tokenizer.encode_answer(TEXT) if id not in tokenizer.eos_ids)


@dataclass(frozen=True)
class _Flight:
    """A step under way. rows: of all chunks."""

    chunks: list[Chunk]
    decode_rows: int
    rows: int
    began_s: float
    due_s: float


class EmulatedReplica:
    """One incarnation of a replica. send: to the control process. text: token ids of every answer, in a circle.

    lost: why the control process wants it rebuilt; empty: it does not. steps: steps that were taken before.
    """

    def __init__(
        self,
        config: Config,
        replica: int,
        times: StepTimes,
        tokenizer: ChatTokenizer,
        records: RankRecords,
        send: Callable[[m.Up], None],
        watch: Watch | None = None,
        steps: int = 0,
    ) -> None:
        self.id, self.steps, self.stopping, self.exit_code, self.lost = replica, steps, False, 0, ""
        engine = config.engine.model_copy(update={"kv_tokens": config.kv_tokens_bound})
        self.scheduler = Scheduler(engine, SlotTable(config.adapter.serving_slots), tokenizer.eos_ids, tokenizer.decode)
        self._text, self._times, self._records = text_ids(tokenizer), times, records
        self._send, self._watch, self._report_s = send, watch or Watch(), config.control.report_s
        self.member = EmulatedMember(
            config.adapter, replica, self.scheduler.slots, send, self._on_version, lambda: self.steps
        )
        self._flight: _Flight | None = None
        self._reported, self._busy_s = time.monotonic(), 0.0
        self._timings: list[tuple[float, float, float]] = []
        self._orders: dict[type, Callable[[Any], None]] = {
            m.Submit: self._submit,
            m.Cancel: self._cancel,
            m.Limits: lambda order: self.scheduler.limit_batch(order.max_batch),
            m.Rebuild: self._rebuild,
            m.Stop: self._stop,
            **self.member.orders,
        }

    def wait_s(self) -> float:
        """Seconds that the next call of step() may wait for messages: 0 while there is work."""
        now, most = time.monotonic(), self._report_s / 2
        if self._flight is not None:
            return max(0.0, min(self._flight.due_s - now, most))
        if self.scheduler.running or self.scheduler.waiting:
            return 0.0
        return min(STEP_S, most) if self.member.micro_batch else most

    def step(self, orders: Sequence[m.Down]) -> None:
        """Handle messages, settle a step of serving that is over and begin the next one, report.

        Messages that come during a step are taken in at once. Those for what is not emulated are ignored.
        """
        self.member.step(time.monotonic())
        for order in orders:
            handle = self._orders.get(type(order))
            if handle is not None:
                handle(order)
        self.member.step(time.monotonic())
        if self._flight is None:
            self._begin()
        elif self._flight.due_s - time.monotonic() < POLLS_S:
            self._settle(self._flight)
            self._begin()
        now = time.monotonic()
        if now - self._reported >= self._report_s:
            self._report(now)
        self._records.maybe_flush()

    def _begin(self) -> None:
        """Begin a step, if there is something to do; one that takes no time is over at once."""
        self._flight, chunks = None, self.scheduler.schedule()
        if not chunks:
            return
        rows = sum(chunk.stop - chunk.start for chunk in chunks)
        decode_rows = sum(chunk.is_decode for chunk in chunks)
        seconds, now = self._times.step_s(decode_rows, rows - decode_rows), time.monotonic()
        flight = _Flight(chunks, decode_rows, rows, now, now + seconds)
        if seconds:
            self._flight = flight
        else:
            self._settle(flight)

    def _settle(self, flight: _Flight) -> None:
        if flight.due_s > flight.began_s:
            time.sleep(max(0.0, flight.due_s - time.monotonic()))
        now, chunks = time.monotonic(), flight.chunks
        tokens = [self._next(chunk) for chunk in chunks if chunk.needs_sampling]
        events = self.scheduler.settle(chunks, tokens, now)
        asked = {c.sequence.id: c.sequence for c in chunks if c.sequence.request.sampling.logprobs is not None}
        if asked:
            events = [_with_logprobs(event, asked.get(event.request_id)) for event in events]
        if events:
            self._watch.sent(now, events)
            self._send(m.Tokens(replica=self.id, events=tuple(events)))
        self._account(flight.decode_rows, flight.rows, max(now - flight.began_s, 1e-6))

    def _next(self, chunk: Chunk) -> int:
        return self._text[(chunk.stop - len(chunk.sequence.request.prompt)) % len(self._text)]

    def _account(self, decode_rows: int, rows: int, seconds: float) -> None:
        self.steps += 1
        self._busy_s += seconds
        record = StepRecord()
        record.note_serving(decode_rows, rows, Regime.ALONE, seconds)
        self._records.engine_step(self.steps, record, self.scheduler)
        if rows == decode_rows and len(self._timings) < TIMINGS:
            self._timings.append((float(decode_rows), float(self.member.micro_batch), seconds))

    def _report(self, now: float) -> None:
        running = float(len(self.scheduler.running))
        report = m.Report(
            replica=self.id,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_used=self.scheduler.pool.used_tokens,
            busy=min(1.0, self._busy_s / (now - self._reported)),
            version=self.scheduler.slots.active,
            training_steps=self.member.training_steps,
            last_loss=self.member.last_loss,
            serve_timings=tuple(self._timings),
            train_timings=((float(self.member.micro_batch), running, STEP_S),) if self.member.micro_batch else (),
        )
        self._send(report)
        self._reported, self._busy_s, self._timings = now, 0.0, []

    def _on_version(self, version: int, round_id: int) -> None:
        self._records.version(version, round_id, self.steps, self.scheduler.slots.slot_of(version) or 0)

    def _submit(self, order: m.Submit) -> None:
        now = time.monotonic()
        self._watch.submitted(now, order.request)
        refused = self.scheduler.add(order.request, now, order.output_ids, order.version)
        if refused is not None:
            self._send(m.Tokens(replica=self.id, events=(refused,)))

    def _cancel(self, order: m.Cancel) -> None:
        event = self.scheduler.cancel(order.request_id)
        if event is not None:
            self._send(m.Tokens(replica=self.id, events=(event,)))

    def _rebuild(self, order: m.Rebuild) -> None:
        self.lost = order.reason

    def _stop(self, order: m.Stop) -> None:
        self.stopping, self.exit_code = True, order.code


def _with_logprobs(event: TokenEvent, sequence: Running | None) -> TokenEvent:
    """Every token is certain, which leaves nothing for others."""
    if sequence is None or not event.tokens:
        return event
    asked = sequence.request.sampling.logprobs
    certain = [TokenLogprob(t, 0.0, ((t, 0.0),)[:asked]) for t in (*sequence.request.prompt[1:], *event.tokens)]
    prompt = len(certain) - len(event.tokens)
    first, sequence.scored = sequence.scored is not None, None
    return replace(event, logprobs=tuple(certain[prompt:]), prompt_logprobs=tuple(certain[:prompt]) if first else ())


class EmulatedSupervisor:
    """The present incarnation. build: makes it for (incarnation, steps so far). on_built: called with each of them."""

    def __init__(
        self, build: Callable[[int], EmulatedReplica], on_built: Callable[[EmulatedReplica, int], None]
    ) -> None:
        self._build, self._on_built = build, on_built
        self.incarnation, self._welcome = 0, True
        self.replica = build(0)
        on_built(self.replica, 0)

    def step(self, payloads: list[bytes] | None) -> None:
        """One step of the replica; the next incarnation if the control process has declared this one lost."""
        self.replica.step(self._of_this_incarnation([decode_down(payload) for payload in payloads or ()]))
        if not self.replica.lost:
            return
        log.warning("emulated replica %d is rebuilt: %s", self.replica.id, self.replica.lost)
        self.incarnation, self._welcome = self.incarnation + 1, False
        self.replica = self._build(self.replica.steps)
        self._on_built(self.replica, self.incarnation)

    def _of_this_incarnation(self, orders: list[m.Down]) -> list[m.Down]:
        """Without the messages that were sent to an earlier incarnation."""
        if self._welcome:
            return orders
        for index, order in enumerate(orders):
            if order == m.Welcome(incarnation=self.incarnation):
                self._welcome = True
                return orders[index + 1 :]
        return [order for order in orders if isinstance(order, m.Stop)]
