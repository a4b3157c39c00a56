"""State policy of a replica: SERVING <-> IDLE with hysteresis, and when it counts as failed."""

from __future__ import annotations

from clif.config import Config
from clif.control.policy.view import ReplicaView
from clif.states import ReplicaState

ALL_SILENT = "all replicas are silent"


def next_state(
    now: float, replica: ReplicaView, config: Config, all_silent_limit_s: float = 0.0
) -> tuple[ReplicaState | None, str]:
    """State that a replica should take now, or None to stay.

    all_silent_limit_s: how long a silence of all replicas is tolerated.

    COMBINED ends with its round, and FAILED with a rebuild, neither of them here. In the baselines (run.mode) load
    changes nothing: a replica that may train is IDLE outside of rounds, any other is SERVING.
    """
    control = config.control
    if replica.state is ReplicaState.FAILED:
        return None, "failed"
    silent = now - replica.last_seen
    if silent > control.lost_after_s:
        if replica.missed_s > control.lost_after_s or silent > control.lost_after_s + all_silent_limit_s:
            return ReplicaState.FAILED, f"silent for {silent:.1f} s"
        return None, ALL_SILENT
    if replica.state is ReplicaState.COMBINED:
        return None, "in a round"
    if not replica.role.trains:
        return None, "only serves"
    if not config.run.adaptive:
        idle = replica.state is ReplicaState.IDLE
        return None if idle else ReplicaState.IDLE, f"run.mode {config.run.mode} does not wait for slack"
    if replica.state is ReplicaState.IDLE:
        if _lasted(now, replica.pressure_since, control.hold_s):
            return ReplicaState.SERVING, f"utilisation {replica.utilisation:.2f} above {control.serving_above:g}"
        return None, "idle"
    # A stale report proves no slack: do not mark the replica IDLE.
    if silent > control.hold_s + 5 * control.report_s:
        return None, f"no report for {silent:.1f} s"
    if _lasted(now, replica.slack_since, control.hold_s):
        return ReplicaState.IDLE, f"utilisation {replica.utilisation:.2f} below {control.idle_below:g}"
    return None, "no lasting slack"


def state_after_round(replica: ReplicaView, config: Config) -> ReplicaState:
    """The state of a member after its round."""
    has_slack = not config.run.adaptive or replica.utilisation <= config.control.serving_above
    return ReplicaState.IDLE if has_slack else ReplicaState.SERVING


def _lasted(now: float, since: float | None, hold_s: float) -> bool:
    return since is not None and now - since >= hold_s
