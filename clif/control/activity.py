"""What is shown of a run while it lasts: counts, the latest events, rounds and versions. In memory, and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from clif.control.events import Events
from clif.control.policy.pressure import Pressure
from clif.control.records import row_of
from clif.control.rounds import Round
from clif.control.totals import Totals
from clif.states import ReplicaState
from clif.types import AdapterVersion, RoundPlan

LATEST = 32
ROUND_COLUMNS = (
    *("round_id", "state", "version", "samples", "tokens", "steps"),
    *("train_loss", "heldout_candidate", "heldout_active", "reason", "gave_up"),
)


class Activity:
    """clock: the server's. rounds: the latest that ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.totals, self.events = Totals(), Events()
        self.rounds: deque[tuple[float, dict[str, Any]]] = deque(maxlen=LATEST)
        self._clock = clock

    def note(self, kind: str, text: str, **fields: Any) -> None:
        """An event that happens now."""
        self.events.add(self._clock(), kind, text, **fields)

    def transition(self, replica: int, before: ReplicaState, after: ReplicaState, reason: str) -> None:
        text = f"replica {replica} {after.value}: {reason}"
        self.note("state", text, replica=replica, before=before.value, after=after.value)

    def pressure(self, pressure: Pressure, reason: str) -> None:
        self.note("pressure", f"pressure {pressure.value}: {reason}", level=pressure.value)

    def version(self, version: AdapterVersion) -> None:
        loss = "" if version.heldout_loss is None else f", held-out loss {version.heldout_loss:.4f}"
        text = f"version {version.number} is stored{loss}"
        self.note("version", text, version=version.number)

    def round_began(self, plan: RoundPlan) -> None:
        self.note("round", f"round {plan.round_id} begins: {len(plan.members)} members", round_id=plan.round_id)

    def round_ended(self, ended: Round) -> None:
        self.totals.round(ended)
        row = row_of(ended)
        shown: dict[str, Any] = {name: row[name] for name in ROUND_COLUMNS}
        shown |= {"members": len(ended.plan.members), "job": ended.plan.job, "adapter": ended.plan.adapter}
        shown["seconds"] = round((ended.over_s or ended.began_s) - ended.began_s, 2)
        self.rounds.append((self._clock(), shown))
        text = f"round {ended.plan.round_id} {ended.state.value}: {ended.reason}"
        self.note("round", text, round_id=ended.plan.round_id, state=ended.state.value)
