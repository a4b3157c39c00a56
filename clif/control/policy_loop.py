"""The policy loop, every control.period_s: latency models, states, pressure, rounds and batch sizes.

It carries out what the pure functions decide, in the order in which each depends on the one before.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from clif.config import Config
from clif.control.dispatcher import Dispatcher
from clif.control.failures import FailureHandler
from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.jobs import JobBoard
from clif.control.policy.batch_sizes import Batches, choose_batches, of_plan
from clif.control.policy.pressure import Pressure, ServiceWindow, service_pressure
from clif.control.policy.replica_state import ALL_SILENT, next_state
from clif.control.policy.round_admission import plan_round
from clif.control.policy.view import ClusterView
from clif.control.recorder import Recorder
from clif.control.records import Records
from clif.states import ReplicaState

log = logging.getLogger(__name__)


class PolicyLoop:
    """Runs the decisions that take seconds to matter.

    window, pressure_reason: what the pressure was decided from last, and why. paused: why an operator wants no round.
    """

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        dispatcher: Dispatcher,
        federation: Federation,
        records: Records,
        failures: FailureHandler,
        recorder: Recorder,
        jobs: JobBoard,
    ) -> None:
        self.pressure = Pressure.LOW
        self.pressure_reason, self.round_reason, self.paused = "", "", ""
        self.window = ServiceWindow()
        self._config, self._fleet, self._dispatcher = config, fleet, dispatcher
        self._federation, self._records, self._failures, self._recorder = federation, records, failures, recorder
        self._jobs, self._all_silent = jobs, False
        self._written: Pressure | None = None

    def step(self, now: float, rounds_may_start: bool) -> str:
        """One step. Returns a line about the round that it started; empty: none."""
        self._fleet.refit()
        self._update_states(now)
        view = replace(self._fleet.view(self._dispatcher.queued), paused=self.paused)
        self._update_pressure(now, view)
        self._jobs.decide(now)
        self._give_up_round(now)
        line = self._maybe_round(now, view) if rounds_may_start else ""
        self._coordinate(now)
        return line

    def _update_states(self, now: float) -> None:
        alive, reasons = self._fleet.view(self._dispatcher.queued).alive, set()
        for replica in alive:
            state, reason = next_state(now, replica, self._config, self._failures.all_silent_limit_s)
            reasons.add(reason)
            if state is ReplicaState.FAILED:
                self._failures.mark_failed(now, replica.replica, reason)
            elif state is not None:
                self._fleet.set_state(now, replica.replica, state, reason)

        self._log_silence(ALL_SILENT in reasons)

    def _log_silence(self, silent: bool) -> None:
        if silent and not self._all_silent:
            limit = self._config.control.lost_after_s
            log.warning(
                "no replica has spoken for %g s: waiting up to %g s more", limit, self._failures.all_silent_limit_s
            )
        elif self._all_silent and not silent:
            log.info("the silence of all replicas is over")
        self._all_silent = silent

    def _update_pressure(self, now: float, view: ClusterView) -> None:
        finished, met = self._recorder.outcomes.count(now)
        capacity = sum(r.max_batch for r in view.serving)
        window = ServiceWindow(finished, met, self._dispatcher.oldest_wait_s(now), self._dispatcher.queued, capacity)
        self.pressure, self.pressure_reason = service_pressure(now, window, self._config)
        self.window = window
        if self.pressure is not self._written:
            self._written = self.pressure
            self._recorder.on_pressure(self.pressure, window, self.pressure_reason)

    def _maybe_round(self, now: float, view: ClusterView) -> str:
        if self._federation.current is not None:
            return ""
        for terms, why in self._jobs.candidates(now, self._federation.history):
            if terms is None:
                self.round_reason = why
                break
            history = self._federation.history_of(terms)
            plan, reason = plan_round(now, view, self.pressure, history, self._config, terms)
            self.round_reason = f"{why}; {reason}" if why else reason
            if plan is not None:
                self._federation.start(now, plan, self.round_reason)
                return f"round {plan.round_id}: replicas {list(plan.members)} train ({self.round_reason})"
        return ""

    def _give_up_round(self, now: float) -> None:
        """Of a job that has ended meanwhile."""
        current = self._federation.current
        objection = "" if current is None else self._jobs.objection(current.plan.job)
        if objection:
            self._federation.abandon(now, objection)

    def _coordinate(self, now: float) -> None:
        current = self._federation.current
        if current is None or current.decided:
            return
        for member in current.members:
            view = self._fleet.view_of(member)
            noise = self._federation.noise_scale
            batches, reason = choose_batches(now, view, len(current.members), noise, self._config)
            wanted = of_plan(batches or Batches(current.plan.micro_batch, view.batch_cap), current.plan, self._config)
            if self._fleet.set_limits(member, wanted.max_batch, wanted.micro_batch):
                self._records.batches(member, wanted, reason)
