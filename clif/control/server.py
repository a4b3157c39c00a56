"""The control process's main loop: hear, submit, dispatch, and every control.period_s decide.

Everything runs in one thread. The decisions are pure functions elsewhere; this file carries them out.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from clif.adapters.store import AdapterStore
from clif.config import Config
from clif.control.answers import Answers
from clif.control.claims import Claims
from clif.control.dispatcher import Dispatcher, Hooks, RequestRecord
from clif.control.durability.ledger import Ledger
from clif.control.durability.shutdown import DRAINED, ShutdownPolicy
from clif.control.failures import FailureHandler
from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.inbox import Inbox, printable
from clif.control.policy.phases import Facts, Phase, next_phase, rounds_may_start
from clif.control.policy.round_admission import wants_rounds
from clif.control.policy_loop import PolicyLoop
from clif.control.progress import Progress, RecentLatencies, Snapshot, count_states
from clif.control.quality import QualityCheck
from clif.control.records import Records, train_loss
from clif.control.rounds import Round
from clif.types import AdapterVersion, FinishReason, Purpose, TrainingSlack
from clif.wire import messages as wire
from clif.wire.channels import ControlChannel

log = logging.getLogger(__name__)
POLL_S = 0.01


class ControlServer:
    """Runs one run from the first Hello to the last Goodbye. clock: monotonic seconds.

    ledger: the journal, with the load that is to come and what earlier starts left.
    shutdown: what may end the run early.
    began: whether all replicas were there, in this process.
    finished: requests of users that ended in this start, by reason.
    """

    def __init__(
        self,
        config: Config,
        channel: ControlChannel,
        clock: Callable[[], float],
        *,
        replicas: int,
        quality: QualityCheck,
        store: AdapterStore,
        records: Records,
        answers: Answers,
        progress: Progress,
        ledger: Ledger,
        shutdown: ShutdownPolicy,
    ) -> None:
        self.config = config
        self.phase = Phase.GATHER
        self.began = False
        self._channel, self._clock = channel, clock
        self._ledger, self._shutdown = ledger, shutdown
        self._load = deque(ledger.recovery.load)
        self._quality, self._records, self._answers, self._progress = quality, records, answers, progress
        hooks = Hooks(finished=self._on_finished, dispatched=records.dispatch)
        self.dispatcher = Dispatcher(config, self._send, hooks)
        self.fleet = Fleet(config, replicas, self._send, self.dispatcher.held, records.transition)
        self.federation = Federation(
            config,
            self.fleet,
            store,
            self._send,
            self._running,
            self._on_round,
            self._on_adapter,
            ledger.write,
            ledger.storing,
        )
        if config.run.resume:
            past = ledger.recovery
            self.federation.resume(past.last_round, past.last_version, past.completed)
        self._failures = FailureHandler(
            config,
            self.fleet,
            self.dispatcher,
            self.federation,
            shutdown,
            self._send,
            lambda: self.phase,
            quality.on_lost,
        )
        self._policy = PolicyLoop(config, self.fleet, self.dispatcher, self.federation, records, self._failures)
        self._recent = RecentLatencies()
        self.finished: Counter[FinishReason] = Counter()
        self._last_loss: float | None = None
        self._steps: dict[int, int] = {}
        self._slack: dict[int, TrainingSlack | None] = {}
        self._unreachable: set[int] = set()
        self._goodbyes: set[int] = set()
        self._entered_s = self._opened_s = clock()
        # Time that the run took before a restart counts, the outage does not.
        self._started_s = self._entered_s - ledger.recovery.run_s
        self._next_policy_s = 0.0
        self._claims = Claims(config, self.fleet, self.federation, quality.most_tokens)
        handlers: dict[type[wire.Message], Callable[[float, Any], None]] = {
            wire.Tokens: self._on_tokens,
            wire.Report: self._on_report,
            wire.StepsDone: self.federation.on_steps,
            wire.Voted: self.federation.on_vote,
            wire.RoundFailed: self.federation.on_failure,
            wire.Published: self.federation.on_published,
            wire.Settled: self.federation.on_settled,
            wire.Evaluated: lambda _, message: self._quality.on_evaluated(message.result),
            wire.Trouble: self._failures.on_trouble,
            wire.Signalled: shutdown.on_signalled,
            wire.Goodbye: self._on_goodbye,
        }
        self._inbox = Inbox(channel, clock, self._claims, self.fleet, self._failures, lambda: self.phase, handlers)

    @property
    def drained(self) -> str:
        """Why the run was ended before it was through, in good order; empty: it was not."""
        return self._shutdown.drain

    def run(self) -> None:
        """Go through all phases. Whatever ends it early, every request gets its terminal event and files close.

        Raises ControlError when the run did not go through.
        """
        try:
            self._run()
        finally:
            # What was shown last may be of some time ago.
            if self._progress.mode != "off":
                self._progress.show(self._clock(), self._snapshot(self._clock()))

    def _run(self) -> None:
        try:
            self._take_over()
            while self.phase is not Phase.DONE:
                self._shutdown.check(self.phase)
                self.step()
        except BaseException as error:
            self._close_out(str(error) or type(error).__name__)
            raise
        self.federation.finish(self._clock(), "the run ended")
        if not self.drained:
            self._ledger.entered(Phase.DONE)
        self._records.close()

    def _take_over(self) -> None:
        """Bring the tables up to date, and take in the requests that earlier starts accepted and did not end."""
        self._ledger.restore(self._records)
        self._records.flush()
        for accepted, arrival_s in self._ledger.open():
            self.dispatcher.submit(self._clock(), accepted.request, arrival_s)

    def step(self) -> None:
        """One step of the loop."""
        self._inbox.step(self._poll_timeout_s())
        now = self._clock()
        self._submit_due(now)
        self.federation.tick(now)
        if self.phase is not Phase.GATHER and not self.fleet.missing:
            if self.dispatcher.queued:
                self.dispatcher.dispatch(now, self.fleet.routing_view)
            if now >= self._next_policy_s:
                self._next_policy_s = now + self.config.control.period_s
                started = self._policy.step(now, rounds_may_start(now, self._facts(), self.config))
                if started:
                    self._progress.note(started)
                if self.phase is Phase.DRAIN:
                    self._ping()
        self._fail_unreachable(now)
        self._failures.step(now)
        self._maybe_next_phase(now)
        self._ledger.step(now, self._load_s(now), now - self._started_s)
        self._records.maybe_flush()
        if self._progress.due(now):
            self._progress.show(now, self._snapshot(now))

    # --- messages ------------------------------------------------------------------------------------

    def _on_tokens(self, now: float, message: wire.Tokens) -> None:
        for event in message.events:
            record = self.dispatcher.held_by(message.replica, event.request_id)
            objection = self._claims.to_event(message.replica, event, record)
            if objection:
                self._failures.broken(now, message.replica, objection)
                return
            self.dispatcher.on_event(now, message.replica, replace(event, detail=printable(event.detail)))

    def _on_report(self, now: float, message: wire.Report) -> None:
        self.fleet.report(now, message)
        self._steps[message.replica] = message.training_steps
        self._slack[message.replica] = message.slack
        if message.last_loss is not None:
            self._last_loss = message.last_loss

    def _on_goodbye(self, now: float, message: wire.Goodbye) -> None:
        if self.phase is Phase.STOPPING:
            self._goodbyes.add(message.replica)
        else:
            self._failures.left(now, message.replica)

    def _ping(self) -> None:
        """Find out who is gone: whether a signal alone came, or a rank died and the launcher clears up."""
        for replica in self.fleet.alive:
            self._send(replica, wire.Ping())

    def _send(self, replica: int, message: wire.Down) -> bool:
        sent = self._channel.send(replica, message)
        # Counted as lost at the end of the step, not here: the caller is in the middle of something.
        if not sent and self.fleet.is_alive(replica):
            self._unreachable.add(replica)
        return sent

    # --- load and failures -----------------------------------------------------------------------------

    def _poll_timeout_s(self) -> float:
        if self.phase is Phase.OPEN and self._load:
            return min(POLL_S, max(0.0, self._opened_s + self._load[0].at_s - self._clock()))
        return POLL_S

    def _submit_due(self, now: float) -> None:
        while self.phase is Phase.OPEN and self._load and self._opened_s + self._load[0].at_s <= now:
            due = self._load.popleft()
            # The planned time counts as arrival, so that a late loop cannot flatter the latencies.
            arrival_s = self._opened_s + due.at_s
            self._ledger.accepted(due, arrival_s)
            self._records.arrival(due)
            self.dispatcher.submit(now, due.request, arrival_s)

    def _load_s(self, now: float) -> float:
        """How long load came, over all starts."""
        return now - self._opened_s if self.phase is Phase.OPEN else self._ledger.recovery.load_s

    def _fail_unreachable(self, now: float) -> None:
        while self._unreachable:
            self._failures.mark_failed(now, self._unreachable.pop(), "not connected any more", gone=True)

    # --- phases --------------------------------------------------------------------------------------

    def _facts(self) -> Facts:
        return Facts(
            phase=self.phase,
            entered_s=self._entered_s,
            started_s=self._started_s,
            missing=self.fleet.missing,
            serving=self._failures.serving,
            measuring=self._quality.pending,
            load_left=len(self._load),
            outstanding=self.dispatcher.outstanding,
            federating=self.federation.busy,
            wants_rounds=wants_rounds(self.federation.history, self.config),
            priced=self.fleet.priced,
            awaiting_goodbye=tuple(r for r in self._reachable if r not in self._goodbyes),
            drain_reason=self._shutdown.drain,
            opened=self._ledger.recovery.opened,
            over=self._ledger.recovery.over,
        )

    def _maybe_next_phase(self, now: float) -> None:
        if self.phase is Phase.LINGER:
            self.federation.wind_up(now, now - self._entered_s - self.config.run.linger_s)
        phase, reason = next_phase(now, self._facts(), self.config)
        if phase is not None:
            self._enter(now, phase, reason)

    def _enter(self, now: float, phase: Phase, reason: str) -> None:
        left, self.phase, self._entered_s = self.phase, phase, now
        self.began = self.began or phase not in (Phase.DRAIN, Phase.STOPPING, Phase.DONE)
        self._progress.note(f"{phase.value}: {reason}")
        if phase is not Phase.DONE:
            self._ledger.entered(phase)
        if left is Phase.GATHER:
            limits = [min(h.max_context, h.kv_tokens) for h in self.fleet.hellos]
            self.dispatcher.context_limit = min([self.dispatcher.context_limit, *limits])
        if left in (Phase.BASELINE, Phase.CLOSING) and not self._quality.pending:
            self._records.quality("before" if left is Phase.BASELINE else "after", self._quality.result)
        if phase in (Phase.BASELINE, Phase.CLOSING):
            self._measure(now)
        elif phase is Phase.OPEN:
            self._opened_s = now - self._ledger.recovery.load_s
        elif phase is Phase.DRAIN:
            self._drain(now, reason)
        elif phase is Phase.STOPPING:
            self._stop(now, reason)

    def _measure(self, now: float) -> None:
        hellos = self.fleet.hellos
        has_rows = self.config.data.path is not None
        judges = [h.replica for h in hellos if has_rows and h.heldout_rows > 0 and self.fleet.is_alive(h.replica)]
        probes = self._quality.begin(judges)
        for replica in judges:
            self._send(replica, wire.Evaluate())
        for probe in probes:
            self.dispatcher.submit(now, probe)

    def _drain(self, now: float, reason: str) -> None:
        """No new load, no new round, no more measuring; what runs and what waits may end within run.drain_s."""
        self._quality.give_up()
        self.dispatcher.cancel_probes(now, reason)
        self.federation.drain(now, reason)
        self._ping()

    def _stop(self, now: float, reason: str) -> None:
        cancelled = self.dispatcher.cancel_all(now, reason)
        if cancelled or self._load:
            log.warning("%d requests cancelled, %d never submitted: %s", cancelled, len(self._load), reason)
        self.federation.abandon(now, reason)
        for replica in self._reachable:
            self._send(replica, wire.Stop(code=DRAINED if self.drained else 0))

    def _close_out(self, reason: str) -> None:
        """Promise 1, whatever dies: end every request or leave it to the next start, and let the replicas go."""
        now = self._clock()
        left = self._shutdown.leaves_open(self.phase)
        try:
            self.dispatcher.fail_all(now, f"the control process ended: {reason}", probes_only=left)
            if left:
                log.warning("%d requests are left to the restart: %s", self.dispatcher.outstanding, reason)
            self.federation.finish(now, reason)
            for replica in self._reachable:
                self._channel.send(replica, wire.Stop(code=1))
        finally:
            self._records.close()

    @property
    def _reachable(self) -> tuple[int, ...]:
        """Replicas that live or are being rebuilt."""
        return (*self.fleet.alive, *self._failures.returning)

    # --- what is told and shown ----------------------------------------------------------------------

    def _on_finished(self, record: RequestRecord) -> None:
        self._ledger.ended(record)
        judgement = self._quality.on_probe(record)
        self._records.request(record, judgement.match if judgement else None)
        self._answers.keep(record, judgement)
        if record.request.purpose is not Purpose.USER:
            return
        assert record.finish is not None
        self.finished[record.finish] += 1
        self._recent.add(record.ttft_s, record.gaps_s)
        if record.finish is not FinishReason.CANCELLED and not record.unservable and record.finished_s is not None:
            self._policy.outcomes.add(record.finished_s, record.slo_met)

    def _on_round(self, ended: Round) -> None:
        self._records.round(ended)
        loss = train_loss(list(ended.results.values()))
        trained = "" if loss is None else f", training loss {loss:.3f}"
        version = f" as version {ended.version}" if ended.promotion else ""
        self._progress.note(f"round {ended.plan.round_id} {ended.state.value}{version}: {ended.reason}{trained}")

    def _on_adapter(self, version: AdapterVersion) -> None:
        self._records.adapter(version)
        # A promotion is what a reader waits for, and what a crash must not take: not left to the next flush.
        self._records.flush()

    def _running(self) -> int:
        return self.dispatcher.running

    def _snapshot(self, now: float) -> Snapshot:
        current = self.federation.current
        alive = [self.fleet.view_of(r).state.value for r in self.fleet.alive]
        return Snapshot(
            seconds=now - self._started_s,
            phase=self.phase.value,
            pressure=self._policy.pressure.value,
            states=count_states(alive),
            running=self.dispatcher.running,
            queued=self.dispatcher.queued,
            load_left=len(self._load),
            finished={reason.value: self.finished[reason] for reason in FinishReason},
            ttft_s=self._recent.ttft_s,
            itl_s=self._recent.itl_s,
            last_loss=self._last_loss,
            training_steps=sum(self._steps.values()),
            slack={r: slack.reason for r in self.fleet.alive if (slack := self._slack.get(r)) is not None},
            version=self.federation.history.version,
            round=f"{current.plan.round_id} {current.state.value}" if current else self._policy.round_reason or "-",
        )
