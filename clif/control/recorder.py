"""What is kept of requests and rounds: in the journal first, then in tables and answers, then a line is shown."""

from __future__ import annotations

from collections import Counter
from typing import Any

from clif.config import Config
from clif.control.dispatcher import Hooks, RequestRecord
from clif.control.durability.journal import RoundBegan, VersionGiven
from clif.control.frontend import Frontend
from clif.control.policy.pressure import OutcomeWindow
from clif.control.ports import Ports
from clif.control.progress import RecentLatencies
from clif.control.records import train_loss
from clif.control.rounds import Round
from clif.types import AdapterVersion, FinishReason, Purpose, RoundPlan


class Recorder:
    """Observes the requests, by the dispatcher's hooks, and the rounds, as the federation's RoundObserver.

    finished: requests of users that ended in this start, by reason. outcomes, latencies: of requests that ended lately.
    """

    def __init__(self, config: Config, ports: Ports) -> None:
        self.finished: Counter[FinishReason] = Counter()
        self.outcomes = OutcomeWindow(config.control.window_s)
        self.latencies = RecentLatencies()
        self.hooks = Hooks(finished=self.on_finished, dispatched=ports.records.dispatch, **_hooks_of(ports.frontend))
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
        self.latencies.add(record.ttft_s, record.gaps_s)
        if record.finish is not FinishReason.CANCELLED and not record.unservable and record.finished_s is not None:
            self.outcomes.add(record.finished_s, record.slo_met)

    def on_round_began(self, plan: RoundPlan) -> None:
        self._ledger.write(RoundBegan(round_id=plan.round_id))

    def on_round_decided(self, current: Round) -> None:
        if current.promotion is not None:
            self._ledger.write(VersionGiven(version=current.version))

    def on_storing(self, current: Round, version: AdapterVersion) -> None:
        self._ledger.storing(current, version)

    def on_stored(self, version: AdapterVersion) -> None:
        self._records.adapter(version)
        # A promotion is what a reader waits for, and what a crash must not take: not left to the next flush.
        self._records.flush()

    def on_round_ended(self, ended: Round) -> None:
        self._records.round(ended)
        loss = train_loss(list(ended.results.values()))
        trained = "" if loss is None else f", training loss {loss:.3f}"
        version = f" as version {ended.version}" if ended.promotion else ""
        self._display.note(f"round {ended.plan.round_id} {ended.state.value}{version}: {ended.reason}{trained}")


def _hooks_of(frontend: Frontend | None) -> dict[str, Any]:
    if frontend is None:
        return {}
    return {"tokens": frontend.on_tokens, "ended": frontend.on_finished, "restarted": frontend.on_restarted}
