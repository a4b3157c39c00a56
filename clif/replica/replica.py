"""One rank's part of a replica: it handles messages of the control process, serves, trains and reports.

Invariant: all ranks of a replica handle the same messages at the same step, so they admit, promote and stop together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from clif.config import Config
from clif.distributed.collectives import RoundBroken
from clif.engine.coserving.backlog import Backlog
from clif.engine.engine import Engine
from clif.engine.jobs import STEP_KINDS, Job, SliceKind
from clif.engine.step_plan import StepMessage, StepPlan, decode_step, encode_step
from clif.replica.records import RankRecords
from clif.training.member import Member, RoundOrders
from clif.training.trainer import StepCut
from clif.types import TokenEvent, TrainingSlack
from clif.wire import messages as m
from clif.wire.channels import decode_down

log = logging.getLogger(__name__)
ROUND = "round"


class CountedLost(RuntimeError):
    """The control process declared this replica lost and reassigned its requests: it must rebuild."""


class Replica:
    """One replica, on one rank. send: sends a message to the control process; does nothing on ranks that do not lead.

    close waits for pending writes. steps: steps that were taken before.
    """

    def __init__(
        self,
        config: Config,
        replica: int,
        engine: Engine,
        member: Member,
        records: RankRecords,
        send: Callable[[m.Up], None],
        close: Callable[[], None] = lambda: None,
        steps: int = 0,
    ) -> None:
        self.config, self.id, self.engine, self.member = config, replica, engine, member
        self.records, self.send, self.close, self.steps = records, send, close, steps
        # Not known until the control process tells.
        engine.backlog = None
        self.stopping = False
        self.exit_code = 0
        self._reported, self._busy_s = time.monotonic(), 0.0
        self._serve_timings: list[tuple[float, float, float]] = []
        self._train_timings: list[tuple[float, float, float]] = []
        self._train_work = 0.0
        self._slack: TrainingSlack | None = None
        self._orders: dict[type, Callable[[Any], None]] = {
            m.Submit: self._submit,
            m.Cancel: self._cancel,
            m.Limits: self._limits,
            # It was taken in before the plan, which depends on it.
            m.Backlog: lambda _: None,
            m.BeginRound: self._begin_round,
            m.JobData: lambda o: member.job_switch.take(o),
            m.JobOver: lambda o: member.job_switch.drop(o.job),
            m.FinishSteps: self._finish_steps,
            m.Aggregate: self._aggregate,
            m.Settle: self._settle,
            m.Install: lambda o: engine.jobs.append(Job("install", member.install(o))),
            m.Keep: self._keep,
            m.Activate: self._activate,
            m.Evaluate: lambda o: engine.jobs.append(Job("evaluate", member.evaluate())),
            m.Ping: lambda _: None,
            m.Rebuild: self._rebuild,
            m.Stop: self._stop,
        }

    def step(self, payloads: list[bytes] | None) -> None:
        """One step: agree on a plan, handle messages, train, serve, report.

        payloads: encoded messages that the leader received; None on its peers, which get them with the plan.
        """
        # Orders change what jobs compute with: like these they belong to training. Serving steps leave the context.
        with self.engine.streams.training():
            inbox, plan = self._agree(payloads)
            for order in inbox:
                self._orders[type(order)](order)
            self._learn(plan)
            self._send(self.engine.serve(plan))
            self._account()

    def _agree(self, payloads: list[bytes] | None) -> tuple[list[m.Down], StepPlan]:
        """The same messages and the same plan on all ranks of the replica. Collective: one message from the leader."""
        group = self.engine.tp_group
        if payloads is None:
            shared = decode_step(group.broadcast_bytes(None))
            self.engine.follow(shared.step)
            return [decode_down(payload) for payload in shared.inbox], shared.step
        inbox = [decode_down(payload) for payload in payloads]
        self._update_backlog(inbox)
        plan = self.engine.plan([order.request for order in inbox if isinstance(order, m.Submit)])
        if group.size > 1:
            group.broadcast_bytes(encode_step(StepMessage(tuple(payloads), plan)))
        return inbox, plan

    def _update_backlog(self, inbox: list[m.Down]) -> None:
        for order in inbox:
            if isinstance(order, m.Backlog):
                self.engine.backlog = Backlog(order.waiting, order.oldest, self.engine.clock())

    def abandon(self) -> None:
        """Best-effort teardown after a failure; errors are logged and ignored."""
        for release in (self.engine.close, self.close):
            try:
                release()
            except Exception:
                log.exception("replica %d: while it was given up", self.id)

    def wait_s(self) -> float:
        """Seconds that the next step may wait for messages: 0 while there is work."""
        if self.engine.busy:
            return 0.0
        # A job that waits for other ranks (an all-reduce, a free slot) is polled often; otherwise only reports are due.
        return 0.002 if self.engine.jobs else self.config.control.report_s / 2

    def _send(self, events: list[TokenEvent]) -> None:
        if events:
            self.send(m.Tokens(replica=self.id, events=tuple(events)))

    def _learn(self, plan: StepPlan) -> None:
        """Train for one slice. A round that breaks (a failed all-reduce, memory) ends for this member; serving
        continues.

        With several ranks this holds only if the round broke on all of them: otherwise the peers wait in the slice.
        """
        try:
            self.engine.learn(plan)
        except RuntimeError as error:
            round_id = self.member.round_id
            if round_id is None or (self.engine.tp_group.size > 1 and not isinstance(error, RoundBroken)):
                raise
            log.exception("round %d broke in replica %d", round_id, self.id)
            self._drop_round()
            self.send(m.RoundFailed(round_id=round_id, replica=self.id, error=str(error)))

    def _account(self) -> None:
        self.steps += 1
        record, scheduler, now = self.engine.record, self.engine.scheduler, time.monotonic()
        self._busy_s += record.serve_s
        self._slack = record.slack or self._slack
        if record.serve_s and not record.prefill_tokens:
            training = float(self.member.micro_batch) if self.engine.training else 0.0
            # The time of a slice is part of the gap between two tokens.
            self._serve_timings.append((float(record.decode_rows), training, record.serve_s + record.gap_s))
        if record.train_kind in STEP_KINDS:
            self._train_work += record.train_s
        if record.train_kind is SliceKind.OPTIMIZER:
            accumulation = self.config.train.accumulation
            self._train_timings.append(
                (float(self.member.micro_batch), float(len(scheduler.running)), self._train_work / accumulation)
            )
            self._train_work = 0.0
        self.records.engine_step(self.steps, record, scheduler)
        if now - self._reported >= self.config.control.report_s:
            self._report(now)
        self.records.maybe_flush()

    def _report(self, now: float) -> None:
        scheduler, last = self.engine.scheduler, self.records.last_step
        self.send(
            m.Report(
                replica=self.id,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                kv_used=scheduler.pool.used_tokens,
                busy=min(1.0, self._busy_s / (now - self._reported)),
                version=scheduler.slots.active,
                training_steps=self.member.job_switch.steps,
                last_loss=last.loss if last else None,
                serve_timings=tuple(self._serve_timings),
                train_timings=tuple(self._train_timings),
                slack=self._slack,
            )
        )
        self._reported, self._busy_s, self._slack = now, 0.0, None
        self._serve_timings, self._train_timings = [], []

    def _submit(self, order: m.Submit) -> None:
        refused = self.engine.scheduler.add(order.request, self.engine.clock(), order.output_ids, order.version)
        if refused is not None:
            self._send([refused])

    def _cancel(self, order: m.Cancel) -> None:
        event = self.engine.scheduler.cancel(order.request_id)
        if event is not None:
            self._send([event])

    def _limits(self, order: m.Limits) -> None:
        self.engine.scheduler.limit_batch(order.max_batch)
        self.member.limit_micro_batch(order.micro_batch)

    def _begin_round(self, order: m.BeginRound) -> None:
        self.engine.jobs.append(Job(ROUND, self.member.take_part(RoundOrders(order.plan, order.group))))

    def _finish_steps(self, order: m.FinishSteps) -> None:
        if self.member.finish_steps(order.round_id):
            self.engine.jobs.interrupt(ROUND, StepCut("the time of the round is up"))

    def _aggregate(self, order: m.Aggregate) -> None:
        self.member.aggregate(order.round_id)

    def _settle(self, order: m.Settle) -> None:
        if order.round_id != self.member.round_id:
            # The first publisher was lost after this replica had settled: this replica sends the adapter instead.
            if order.commit and order.publish and self.member.can_publish(order.version):
                self.member.publish(order)
        elif order.commit:
            self.member.settle(order)
        else:
            self._drop_round()
            self.member.discard()

    def _keep(self, order: m.Keep) -> None:
        self.member.keep(order.versions)

    def _activate(self, order: m.Activate) -> None:
        self.member.activate(order.version)

    def _drop_round(self) -> None:
        self.engine.jobs.drop(ROUND)

    def _rebuild(self, order: m.Rebuild) -> None:
        raise CountedLost(order.reason)

    def _stop(self, order: m.Stop) -> None:
        self.stopping, self.exit_code = True, order.code
