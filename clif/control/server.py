"""The control process's main loop: receive, submit, dispatch, decide every control.period_s, record, report.

Everything runs in one thread. The decisions are pure functions (clif/control/policy); this package carries them out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from clif.config import Config
from clif.control.activity import Activity
from clif.control.backlog_updates import BacklogUpdates
from clif.control.claims import Claims
from clif.control.clients import Clients
from clif.control.dispatcher import Dispatcher
from clif.control.failures import FailureHandler
from clif.control.federation import Federation, RoundObservers
from clif.control.fleet import Fleet
from clif.control.inbox import Inbox, printable
from clif.control.job_actions import JobActions
from clif.control.job_shares import JobShares
from clif.control.jobs import JobBoard
from clif.control.operator import Operator
from clif.control.policy.phases import Phase
from clif.control.policy_loop import PolicyLoop
from clif.control.ports import Ports
from clif.control.quality_scores import QualityScores
from clif.control.recorder import Recorder
from clif.control.reporter import Reporter
from clif.control.run_phases import RunPhases
from clif.control.run_state import RunState
from clif.control.run_status import StatusReport
from clif.control.version_actions import VersionActions
from clif.control.version_handlers import VersionHandlers
from clif.control.version_updates import VersionUpdates
from clif.control.versions import Versions
from clif.jobs.store import StoreFailed
from clif.types import FinishReason, of_client
from clif.wire import messages as wire

log = logging.getLogger(__name__)
POLL_S = 0.01


class ControlServer:
    """Runs one run from the first Hello to the last Goodbye. clock: monotonic seconds."""

    def __init__(self, config: Config, ports: Ports, clock: Callable[[], float], replicas: int) -> None:
        self.config = config
        self._ports, self._clock = ports, clock
        self._ledger, past, now = ports.ledger, ports.ledger.recovery, clock()
        state = RunState(started_s=now - past.run_s, entered_s=now, opened_s=now)
        recorder = Recorder(config, ports, Activity(clock))
        self.dispatcher = Dispatcher(config, self._send, recorder.hooks)
        self.fleet = Fleet(config, replicas, self._send, self.dispatcher.held, recorder.on_transition)
        self.versions = Versions(config, ports.store, self.fleet, ports.ledger.unix)
        self.jobs = JobBoard(config, ports.jobs, self.fleet, self.versions, ports.ledger.unix)
        observers = RoundObservers(recorder, self.jobs)
        self.federation = Federation(config, self.fleet, self.dispatcher, self.versions, observers)
        self._resume_jobs()
        if config.run.resume:
            self.federation.resume(past.last_round, past.last_version, past.completed)
        parts = self.fleet, self.dispatcher, self.federation
        self._failures = FailureHandler(config, state, *parts, ports.quality, ports.shutdown)
        self._scores = QualityScores(config, ports.scoring, ports.records)
        self.phases = RunPhases(config, ports, state, *parts, self._failures, self.jobs, self._scores, self.versions)
        self._policy = PolicyLoop(config, *parts, ports.records, self._failures, recorder, self.jobs)
        self._reporter = Reporter(ports, state, *parts, self._policy, recorder)
        self._state, self._recorder = state, recorder
        most_tokens = ports.quality.most_tokens
        self._claims = Claims(config, self.fleet, self.federation, self.versions, most_tokens, self.jobs)
        self._version_updates = VersionUpdates(self.fleet, self.federation, self.versions)
        self.version_actions = VersionActions(config, self.fleet, self.federation, self.versions, observers)
        operator = Operator(self.fleet, self._policy, ports.ledger, recorder.activity)
        version_handlers = VersionHandlers(self.versions, self.version_actions, recorder.activity)
        self.status = StatusReport(
            config, *parts, self._policy, self.versions, self._reporter, recorder.activity, self.jobs, self._scores
        )
        shares = JobShares(config.jobs, ports.jobs, self.versions)
        clients_jobs = JobActions(self.jobs, ports.ledger.unix, self.versions.active, shares)
        handlers = {**operator.handlers(), **version_handlers.handlers(), **clients_jobs.handlers()}
        self._clients = Clients(config, ports, state, self.dispatcher, self.versions, handlers, self.status)
        inbox_parts = state, self._claims, self.fleet, self._failures, self._handlers(), self._clients.take
        self._inbox = Inbox(ports.channel, clock, *inbox_parts)
        self._backlog_updates = BacklogUpdates(self.fleet, self.dispatcher, self.federation)
        self._unreachable: set[int] = set()
        self._next_policy_s = 0.0

    def _handlers(self) -> dict[type[wire.Message], Callable[[float, Any], None]]:
        return {
            wire.Tokens: self._on_tokens,
            wire.Report: self._on_report,
            wire.StepsDone: self.federation.on_steps,
            wire.Voted: self.federation.on_vote,
            wire.RoundFailed: self.federation.on_failure,
            wire.Published: self.federation.on_published,
            wire.Settled: self._on_settled,
            wire.Held: self._on_held,
            wire.Evaluated: lambda _, message: self._ports.quality.on_evaluated(message.result),
            wire.Trouble: self._failures.on_trouble,
            wire.Signalled: self._ports.shutdown.on_signalled,
            wire.Goodbye: self.phases.on_goodbye,
        }

    @property
    def phase(self) -> Phase:
        return self._state.phase

    @property
    def began(self) -> bool:
        """Whether all replicas were there, in this process."""
        return self._state.began

    @property
    def finished(self) -> Counter[FinishReason]:
        """Requests of users that ended in this start, by reason."""
        return self._recorder.finished

    @property
    def drained(self) -> str:
        """Why the run was ended before it was through, in good order; empty: it was not."""
        return self._ports.shutdown.drain

    def run(self) -> None:
        """Go through all phases. Whatever ends it early, every request gets its terminal event and files close.

        Raises ControlError when the run did not go through.
        """
        try:
            self._run()
        finally:
            self._scores.stop()
            # The last snapshot may be old.
            self._reporter.show(self._clock())

    def _run(self) -> None:
        try:
            self._take_over()
            while self.phase is not Phase.DONE:
                self._ports.shutdown.check(self.phase)
                self.step()
        except BaseException as error:
            if isinstance(error, StoreFailed):
                self._clients.drop_replies()
            self._close_out(str(error) or type(error).__name__)
            raise
        self.federation.finish(self._clock(), "the run ended")
        if not self.drained:
            self._ledger.entered(Phase.DONE)
        self.jobs.commit()
        self._clients.close(self._clock())
        self._ports.records.close()

    def _take_over(self) -> None:
        """Bring the tables up to date, and take in the requests that earlier starts accepted and did not end."""
        self._ledger.restore(self._ports.records)
        self._ports.records.flush()
        for accepted, arrival_s in self._ledger.open():
            if of_client(accepted.request.id):
                lost = "its connection ended with the control process that had accepted it"
                self.dispatcher.fail(self._clock(), accepted.shown, arrival_s, lost)
            else:
                self.dispatcher.submit(self._clock(), accepted.request, arrival_s)

    def _resume_jobs(self) -> None:
        past = self._ledger.recovery
        rows = {number: line.row for number, line in past.stored.items()}
        self.jobs.begin(self._clock(), self._ports.store.committed(), rows)
        for job, history in self.jobs.histories().items():
            self.federation.continue_job(job, history)

    def step(self) -> None:
        """One step of the loop."""
        self._inbox.step(self._poll_timeout_s())
        now = self._clock()
        self._submit_due(now)
        self.federation.advance(now)
        self.versions.step(now)
        self._version_updates.step()
        if self.phase is not Phase.GATHER and not self.fleet.missing:
            self.dispatcher.dispatch(now, self.fleet.routing_view)
            self._backlog_updates.step(now)
            self.jobs.step(now)
            self._maybe_decide(now)
        self._fail_unreachable(now)
        self._failures.step(now)
        self.phases.step(now)
        self._ledger.step(now, self.phases.load_s(now), now - self._state.started_s)
        self._ports.records.maybe_flush()
        # What clients are told of has been made durable before.
        self.jobs.commit()
        self._clients.step(now)
        self._reporter.step(now)

    def _poll_timeout_s(self) -> float:
        if self.phase is not Phase.OPEN:
            return POLL_S
        now = self._clock()
        return min([POLL_S, *(source.wait_s(now) for source in self._ports.sources)])

    def _submit_due(self, now: float) -> None:
        if self.phase is not Phase.OPEN:
            return
        for source in self._ports.sources:
            for due in source.due(now):
                self._ledger.accepted(due)
                self._ports.records.arrival(due)
                self.dispatcher.submit(now, due.request, due.arrival_s)

    def _maybe_decide(self, now: float) -> None:
        if now < self._next_policy_s:
            return
        self._next_policy_s = now + self.config.control.period_s
        started = self._policy.step(now, self.phases.rounds_may_start(now))
        if started:
            self._ports.display.note(started)
        if self.phase is Phase.DRAIN:
            self.phases.ping()

    # --- messages ------------------------------------------------------------------------------------

    def _on_tokens(self, now: float, message: wire.Tokens) -> None:
        for event in message.events:
            record = self.dispatcher.held_by(message.replica, event.request_id)
            objection = self._claims.to_event(message.replica, event, record)
            if objection:
                self._failures.mark_broken(now, message.replica, objection)
                return
            shown = replace(event, detail=printable(event.detail)) if event.detail else event
            self.dispatcher.on_event(now, message.replica, shown)

    def _on_settled(self, now: float, message: wire.Settled) -> None:
        self.federation.on_settled(now, message)
        self._version_updates.correct(message.replica)

    def _on_held(self, now: float, message: wire.Held) -> None:
        self.fleet.holds(message.replica, message.versions)
        self._version_updates.correct(message.replica)

    def _on_report(self, now: float, message: wire.Report) -> None:
        self.fleet.report(now, message)
        self._reporter.on_report(message)

    def _send(self, replica: int, message: wire.Down) -> bool:
        sent = self._ports.channel.send(replica, message)
        # Marked as failed at the end of the step, not here: the caller may be in the middle of a change.
        if not sent and self.fleet.is_alive(replica):
            self._unreachable.add(replica)
        return sent

    def _fail_unreachable(self, now: float) -> None:
        while self._unreachable:
            self._failures.mark_failed(now, self._unreachable.pop(), "not connected any more", gone=True)

    def _close_out(self, reason: str) -> None:
        """Promise 1, whatever dies: end every request or leave it to the next start, and let the replicas go."""
        now = self._clock()
        left = self._ports.shutdown.leaves_open(self.phase)
        try:
            self.dispatcher.fail_all(now, f"the control process ended: {reason}", left=left)
            if left:
                log.warning("%d requests are left to the restart: %s", self.dispatcher.outstanding, reason)
            self.federation.finish(now, reason)
            self.jobs.commit()
            for replica in self._failures.reachable:
                self._ports.channel.send(replica, wire.Stop(code=1))
            self._clients.close(now)
        finally:
            self._ports.records.close()
