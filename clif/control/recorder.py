"""What is kept of requests and rounds: in the journal first, then in tables and answers, then a line is shown."""

from __future__ import annotations

from collections import Counter
from typing import Any

from clif.config import Config
from clif.control.activity import Activity
from clif.control.dispatcher import Hooks, RequestRecord
from clif.control.durability.journal import RoundBegan, VersionGiven
from clif.control.policy.pressure import OutcomeWindow, Pressure, ServiceWindow
from clif.control.ports import Ports
from clif.control.progress import RecentLatencies
from clif.control.records import train_loss
from clif.control.rounds import Round
from clif.states import ReplicaState
from clif.types import AdapterVersion, FinishReason, Purpose, RoundPlan, TokenEvent


class Recorder:
    """Observes the requests, by the dispatcher's hooks, and the rounds, as the federation's RoundObserver.

    finished: requests of users that ended in this start, by reason. outcomes, latencies: of requests that ended lately.
    activity: what of it is shown while the run lasts.
    """

    def __init__(self, config: Config, ports: Ports, activity: Activity) -> None:
        self.finished: Counter[FinishReason] = Counter()
        self.outcomes = OutcomeWindow(config.control.window_s)
        self.latencies = RecentLatencies()
        self.activity, self._frontend = activity, ports.frontend
        self.hooks = Hooks(
            finished=self.on_finished, dispatched=ports.records.dispatch, tokens=self.on_tokens, **self._for_clients()
        )
        self._ledger, self._records, self._answers = ports.ledger, ports.records, ports.answers
        self._quality, self._display = ports.quality, ports.display

    def on_finished(self, record: RequestRecord) -> None:
        self._ledger.ended(record)
        judgement = self._quality.on_probe(record)
        self._records.request(record, judgement.match if judgement else None)
        self._answers.keep(record, judgement)
        if record.request.purpose is not Purpose.USER:
            return
        assert record.finish is not None
        self.finished[record.finish] += 1
        self.activity.totals.request(record)
        self.latencies.add(record.ttft_s, record.gaps_s)
        if record.finish is not FinishReason.CANCELLED and not record.unservable and record.finished_s is not None:
            self.outcomes.add(record.finished_s, record.slo_met)

    def on_tokens(self, record: RequestRecord, event: TokenEvent) -> None:
        if record.request.purpose is Purpose.USER:
            self.activity.totals.tokens(event)
        if self._frontend is not None:
            self._frontend.on_tokens(record, event)

    def on_transition(self, replica: int, before: ReplicaState, after: ReplicaState, reason: str) -> None:
        self._records.transition(replica, before, after, reason)
        self.activity.transition(replica, before, after, reason)

    def on_pressure(self, pressure: Pressure, window: ServiceWindow, reason: str) -> None:
        self._records.pressure(pressure, window, reason)
        self.activity.pressure(pressure, reason)

    def on_round_began(self, plan: RoundPlan) -> None:
        self._ledger.write(RoundBegan(round_id=plan.round_id))
        self.activity.round_began(plan)

    def on_round_decided(self, current: Round) -> None:
        if current.promotion is not None:
            self._ledger.write(VersionGiven(version=current.version))

    def on_storing(self, current: Round, version: AdapterVersion) -> None:
        self._ledger.storing(current, version)

    def on_stored(self, version: AdapterVersion) -> None:
        self._records.adapter(version)
        # A promotion is what a reader waits for, and what a crash must not take: not left to the next flush.
        self._records.flush()
        self.activity.version(version)

    def on_round_ended(self, ended: Round) -> None:
        self._records.round(ended)
        self.activity.round_ended(ended)
        loss = train_loss(list(ended.results.values()))
        trained = "" if loss is None else f", training loss {loss:.3f}"
        version = f" as version {ended.version}" if ended.promotion else ""
        self._display.note(f"round {ended.plan.round_id} {ended.state.value}{version}: {ended.reason}{trained}")

    def _for_clients(self) -> dict[str, Any]:
        if self._frontend is None:
            return {}
        return {"ended": self._frontend.on_finished, "restarted": self._frontend.on_restarted}
