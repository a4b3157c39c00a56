"""What is shown of a run while it lasts: snapshots of the control server's parts, at the display's own pace."""

from __future__ import annotations

from clif.control.dispatcher import Dispatcher
from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.policy_loop import PolicyLoop
from clif.control.ports import Ports
from clif.control.progress import Snapshot
from clif.control.recorder import Recorder
from clif.control.run_state import RunState
from clif.states import ReplicaState
from clif.types import FinishReason, TrainingSlack
from clif.wire.messages import Report


class Reporter:
    """Reads every part and changes none."""

    def __init__(
        self,
        ports: Ports,
        state: RunState,
        fleet: Fleet,
        dispatcher: Dispatcher,
        federation: Federation,
        policy: PolicyLoop,
        recorder: Recorder,
    ) -> None:
        self._display, self._sources, self._state = ports.display, ports.sources, state
        self._fleet, self._dispatcher, self._federation = fleet, dispatcher, federation
        self._policy, self._recorder = policy, recorder
        self._last_loss: float | None = None
        self._steps: dict[int, int] = {}
        self._slack: dict[int, TrainingSlack | None] = {}

    def on_report(self, message: Report) -> None:
        self._steps[message.replica] = message.training_steps
        self._slack[message.replica] = message.slack
        if message.last_loss is not None:
            self._last_loss = message.last_loss

    def step(self, now: float) -> None:
        if self._display.due(now):
            self.show(now)

    def show(self, now: float) -> None:
        self._display.show(now, self.snapshot(now))

    def snapshot(self, now: float) -> Snapshot:
        current, recorder = self._federation.current, self._recorder
        alive = self._fleet.alive
        return Snapshot(
            seconds=now - self._state.started_s,
            phase=self._state.phase.value,
            pressure=self._policy.pressure.value,
            states={state: n for state, n in self._fleet.tally().states.items() if state != ReplicaState.FAILED},
            running=self._dispatcher.running,
            queued=self._dispatcher.queued,
            load_left=sum(source.remaining for source in self._sources),
            finished={reason.value: recorder.finished[reason] for reason in FinishReason},
            ttft_s=recorder.latencies.ttft_s,
            itl_s=recorder.latencies.itl_s,
            last_loss=self._last_loss,
            training_steps=sum(self._steps.values()),
            slack={r: slack.reason for r in alive if (slack := self._slack.get(r)) is not None},
            version=self._federation.history.version,
            round=f"{current.plan.round_id} {current.state.value}" if current else self._policy.round_reason or "-",
        )
