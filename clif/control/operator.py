"""What an operator may ask of training and of replicas while the run lasts. It outlives a restart, in the journal.

Invariant: the decisions see it as their input, with the operator's reason, and nothing else changes by it.
"""

from __future__ import annotations

from typing import Any

from clif.control.activity import Activity
from clif.control.durability.journal import ReplicaDrained, TrainingPaused
from clif.control.durability.ledger import Ledger
from clif.control.fleet import Fleet
from clif.control.frontend import Handlers
from clif.control.policy_loop import PolicyLoop
from clif.wire.frontend import DrainReplica, PauseTraining, Refused, ResumeTraining, UndrainReplica

NO_REASON = "an operator asked for it"


class Operator:
    """Writes the pause of training into the policy loop, and drained replicas into the fleet."""

    def __init__(self, fleet: Fleet, policy: PolicyLoop, ledger: Ledger, activity: Activity) -> None:
        self._fleet, self._policy, self._ledger, self._activity = fleet, policy, ledger, activity
        policy.paused = ledger.recovery.paused
        for replica, reason in ledger.recovery.drained.items():
            if replica < fleet.expected:
                fleet.drain(replica, reason)

    def handlers(self) -> Handlers:
        return {
            PauseTraining: lambda now, action: self.pause(action.reason or NO_REASON),
            ResumeTraining: lambda now, action: self.pause(""),
            DrainReplica: lambda now, action: self.drain(action.replica, action.reason or NO_REASON),
            UndrainReplica: lambda now, action: self.undrain(action.replica),
        }

    def pause(self, reason: str) -> dict[str, Any]:
        """No round begins from now on; the one under way goes on to its end. An empty reason ends the pause."""
        if reason != self._policy.paused:
            self._ledger.write(TrainingPaused(reason=reason))
            self._policy.paused = reason
            text = f"training is paused: {reason}" if reason else "training goes on"
            self._activity.note("operator", text)
        return {"paused": bool(reason), "reason": reason}

    def drain(self, replica: int, reason: str) -> dict[str, Any]:
        """It gets no request and joins no round; what it has begun goes on. Raises Refused."""
        self._check(replica)
        others = [other for other in self._fleet.serving if other != replica and other not in self._fleet.drained]
        if not others and self._fleet.serves(replica):
            raise Refused("conflict", f"replica {replica} is the last one that takes requests: undrain another first")
        self._set(replica, reason)
        return self._state(replica)

    def undrain(self, replica: int) -> dict[str, Any]:
        """Requests and rounds may use it again. Raises Refused."""
        self._check(replica)
        if replica in self._fleet.drained:
            self._set(replica, "")
        return self._state(replica)

    def _set(self, replica: int, reason: str) -> None:
        self._ledger.write(ReplicaDrained(replica=replica, reason=reason))
        if reason:
            self._fleet.drain(replica, reason)
        else:
            self._fleet.undrain(replica)
        text = f"replica {replica} is drained: {reason}" if reason else f"replica {replica} is no longer drained"
        self._activity.note("operator", text, replica=replica)

    def _check(self, replica: int) -> None:
        if not self._fleet.was_here(replica):
            last = self._fleet.expected - 1
            raise Refused("not_found", f"there is no replica {replica}: their numbers are 0 to {last}", "replica")

    def _state(self, replica: int) -> dict[str, Any]:
        view = self._fleet.view_of(replica)
        return {
            "replica": replica,
            "state": view.state.value,
            "drained": view.drained,
            "outstanding": view.outstanding,
        }
