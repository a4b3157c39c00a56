"""The phases of a run carried out: the facts that the decision needs, and what entering each phase does."""

from __future__ import annotations

import logging
from dataclasses import replace

from clif.config import Config
from clif.control.dispatcher import Dispatcher
from clif.control.durability.shutdown import DRAINED
from clif.control.failures import FailureHandler
from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.jobs import JobBoard
from clif.control.policy.phases import Facts, Phase, next_phase, rounds_may_start
from clif.control.policy.round_admission import wants_rounds
from clif.control.ports import Ports
from clif.control.quality import Quality
from clif.control.quality_scores import QualityScores
from clif.control.run_state import RunState
from clif.control.versions import Versions
from clif.types import CLIF
from clif.wire import messages as wire

log = logging.getLogger(__name__)
MEASURED = {Phase.BASELINE: "before", Phase.CLOSING: "after"}
"""Phases in which quality is measured."""


class RunPhases:
    """The one writer of the run's state. Which phase begins when is decided in policy/phases.py."""

    def __init__(
        self,
        config: Config,
        ports: Ports,
        state: RunState,
        fleet: Fleet,
        dispatcher: Dispatcher,
        federation: Federation,
        failures: FailureHandler,
        jobs: JobBoard,
        scores: QualityScores,
        versions: Versions,
    ) -> None:
        self.state = state
        self._config, self._fleet, self._dispatcher = config, fleet, dispatcher
        self._federation, self._failures, self._jobs = federation, failures, jobs
        self._sources, self._quality, self._records = ports.sources, ports.quality, ports.records
        self._ledger, self._shutdown, self._display = ports.ledger, ports.shutdown, ports.display
        self._scores, self._versions = scores, versions
        self._goodbyes: set[int] = set()
        self._result: Quality | None = None
        self._earlier: list[int] = []

    def step(self, now: float) -> None:
        """Enter the next phase once the present one is complete. Raises ControlError when the run cannot continue."""
        self._score(now)
        if self.state.phase is Phase.LINGER:
            self._federation.wind_up(now, now - self.state.entered_s - self._config.run.linger_s)
        phase, reason = next_phase(now, self.facts(), self._config)
        if phase is not None:
            self._enter(now, phase, reason)

    def _score(self, now: float) -> None:
        measured = self._quality.take()
        if measured is not None:
            self._scores.add(MEASURED[self.state.phase], measured)
            if self._result is None:
                self._result = measured
            self._measure_earlier(now)
        self._scores.step(now)

    def rounds_may_start(self, now: float) -> bool:
        return rounds_may_start(now, replace(self.facts(), latency_known=self._fleet.latency_known), self._config)

    def facts(self) -> Facts:
        """Once per step, so without what costs a scan of all replicas: latency_known, and goodbyes before STOPPING."""
        past, state = self._ledger.recovery, self.state
        expected = self._failures.reachable if state.phase is Phase.STOPPING else ()
        return Facts(
            phase=state.phase,
            entered_s=state.entered_s,
            started_s=state.started_s,
            missing=self._fleet.missing,
            serving=self._failures.serving,
            measuring=self._quality.pending or bool(self._earlier),
            scoring=self._scores.pending,
            exhausted=all(source.exhausted for source in self._sources),
            load_left=self.load_left,
            outstanding=self._dispatcher.outstanding,
            federating=self._federation.busy,
            wants_rounds=self._jobs.wanted or wants_rounds(self._federation.history, self._config),
            awaiting_goodbye=tuple(r for r in expected if r not in self._goodbyes),
            drain_reason=self._shutdown.drain,
            opened=past.opened,
            over=past.over,
        )

    @property
    def load_left(self) -> int:
        return sum(source.remaining for source in self._sources)

    def load_s(self, now: float) -> float:
        """How long load came, over all starts, seconds."""
        return now - self.state.opened_s if self.state.phase is Phase.OPEN else self._ledger.recovery.load_s

    def on_goodbye(self, now: float, message: wire.Goodbye) -> None:
        if self.state.phase is Phase.STOPPING:
            self._goodbyes.add(message.replica)
        else:
            self._failures.mark_left(now, message.replica)

    def ping(self) -> None:
        """Find out which replicas are gone: a launcher that clears up after a dead rank also sends signals."""
        for replica in self._fleet.alive:
            self._fleet.send(replica, wire.Ping())

    def _enter(self, now: float, phase: Phase, reason: str) -> None:
        state = self.state
        left, state.phase, state.entered_s = state.phase, phase, now
        state.began = state.began or phase not in (Phase.DRAIN, Phase.STOPPING, Phase.DONE)
        self._display.note(f"{phase.value}: {reason}")
        if phase is not Phase.DONE:
            self._ledger.entered(phase)
        self._leave(left)
        if phase in MEASURED:
            self._measure(now, phase)
        elif phase is Phase.OPEN:
            self._open(now)
        elif phase is Phase.DRAIN:
            self._drain(now, reason)
        elif phase is Phase.STOPPING:
            self._stop(now, reason)

    def _leave(self, phase: Phase) -> None:
        if phase is Phase.GATHER:
            limits = [min(h.max_context, h.kv_tokens) for h in self._fleet.hellos]
            self._dispatcher.context_limit = min([self._dispatcher.context_limit, *limits])
        elif phase in MEASURED and self._result is not None:
            self._records.quality(MEASURED[phase], self._result)

    def _measure(self, now: float, phase: Phase) -> None:
        has_rows = self._config.data.path is not None
        judges = [
            h.replica for h in self._fleet.hellos if has_rows and h.heldout_rows > 0 and self._fleet.is_alive(h.replica)
        ]
        if phase is Phase.CLOSING:
            self._earlier = self._versions.earlier(CLIF, self._config.quality.earlier_versions)
        self._result = None
        probes = self._quality.begin(judges)
        for replica in judges:
            self._fleet.send(replica, wire.Evaluate())
        for probe in probes:
            self._dispatcher.submit(now, probe)

    def _measure_earlier(self, now: float) -> None:
        """The next of the earlier versions answers, one at a time: one slot is enough for all of them."""
        version = self._earlier.pop(0) if self._earlier else 0
        self._versions.probe(version)
        for probe in self._quality.begin((), version) if version else ():
            self._dispatcher.submit(now, probe)

    def _open(self, now: float) -> None:
        self.state.opened_s = now - self._ledger.recovery.load_s
        for source in self._sources:
            source.open(self.state.opened_s)

    def _drain(self, now: float, reason: str) -> None:
        """No new load, no new round, no measuring; running and waiting requests may end within run.drain_s."""
        self._quality.give_up()
        self._scores.stop()
        self._earlier.clear()
        self._versions.probe(0)
        self._dispatcher.cancel_probes(now, reason)
        self._federation.drain(now, reason)
        self.ping()

    def _stop(self, now: float, reason: str) -> None:
        cancelled = self._dispatcher.cancel_all(now, reason)
        if cancelled or self.load_left:
            log.warning("%d requests cancelled, %d never submitted: %s", cancelled, self.load_left, reason)
        self._federation.abandon(now, reason)
        for replica in self._failures.reachable:
            self._fleet.send(replica, wire.Stop(code=DRAINED if self._shutdown.drain else 0))
