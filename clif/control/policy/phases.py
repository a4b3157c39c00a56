"""The phases of a run as data, and the pure decision when the next one begins."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from clif.config import Config

GATHER_S = 900.0
"""Longest wait for all replicas to load their model and say Hello, seconds."""
STOPPING_S = 15.0
"""Longest wait for the replicas' Goodbye, seconds."""
DRAINED_S = 2.0
"""The same after a drain: run.drain_s has used up most of the time that the launcher grants."""


class Phase(enum.StrEnum):
    """GATHER: replicas load. BASELINE / CLOSING: quality before / after. OPEN: load. LINGER: what is under way ends.

    DRAIN: after a signal, from any phase before STOPPING: no new load; running requests may end within run.drain_s.
    """

    GATHER = "gather"
    BASELINE = "baseline"
    OPEN = "open"
    LINGER = "linger"
    CLOSING = "closing"
    DRAIN = "drain"
    STOPPING = "stopping"
    DONE = "done"


ORDER: dict[Phase, Phase] = {
    Phase.GATHER: Phase.BASELINE,
    Phase.BASELINE: Phase.OPEN,
    Phase.OPEN: Phase.LINGER,
    Phase.LINGER: Phase.CLOSING,
    Phase.CLOSING: Phase.STOPPING,
    Phase.DRAIN: Phase.STOPPING,
    Phase.STOPPING: Phase.DONE,
}


class ControlError(RuntimeError):
    """The run cannot continue; the message says why."""


@dataclass(frozen=True)
class Facts:
    """What the phase decision needs. entered_s: start of the phase; started_s: of the run; seconds of the clock.

    serving: replicas that can answer requests, now or when they are rebuilt. drain_reason: why the run is to
    drain; empty: it is not. awaiting_goodbye: replicas that have not left yet.
    exhausted: whether no source has requests to come; load_left: how many are known to come.
    opened, over: whether the load had begun, or all had been done, before the control process was started again.
    wants_rounds: more rounds are to begin even without load. latency_known: see Fleet.latency_known.
    """

    phase: Phase
    entered_s: float
    started_s: float
    missing: tuple[int, ...] = ()
    serving: int = 1
    measuring: bool = False
    scoring: bool = False
    exhausted: bool = True
    load_left: int = 0
    outstanding: int = 0
    federating: bool = False
    wants_rounds: bool = False
    latency_known: bool = True
    awaiting_goodbye: tuple[int, ...] = ()
    drain_reason: str = ""
    opened: bool = False
    over: bool = False


def next_phase(now: float, facts: Facts, config: Config) -> tuple[Phase | None, str]:
    """The phase that begins now, or None to stay. Raises ControlError when the run cannot continue."""
    phase, waited = facts.phase, now - facts.entered_s
    if phase in (Phase.STOPPING, Phase.DONE):
        limit = DRAINED_S if facts.drain_reason else STOPPING_S
        if phase is Phase.DONE or (facts.awaiting_goodbye and waited < limit):
            return None, f"waiting for goodbyes of replicas {list(facts.awaiting_goodbye)}"
        return Phase.DONE, "all replicas left" if not facts.awaiting_goodbye else f"no goodbye in {limit:g} s"
    if facts.drain_reason and phase is not Phase.DRAIN:
        # Nothing runs before every replica has joined.
        return (Phase.STOPPING if phase is Phase.GATHER else Phase.DRAIN), facts.drain_reason
    if phase is Phase.GATHER:
        if facts.missing and waited > GATHER_S:
            raise ControlError(f"replicas {list(facts.missing)} did not report within {GATHER_S:g} s: see their logs")
    elif not facts.serving:
        raise ControlError("no replica that serves is left")
    if config.run.max_s is not None and now - facts.started_s > config.run.max_s:
        if phase in (Phase.GATHER, Phase.BASELINE):
            raise ControlError(f"run.max_s {config.run.max_s:g} passed before the load could start: raise it")
        return Phase.STOPPING, f"run.max_s {config.run.max_s:g} is over"
    reason = _unfinished(waited, facts, config)
    if reason:
        return None, reason
    if phase is Phase.DRAIN:
        return Phase.STOPPING, facts.drain_reason
    if phase is Phase.GATHER and facts.over:
        return Phase.STOPPING, "the run had gone through before the restart"
    if phase is Phase.GATHER and facts.opened:
        return Phase.OPEN, "the load goes on"
    return ORDER[phase], f"{phase.value} is through"


def rounds_may_start(now: float, facts: Facts, config: Config) -> bool:
    """Rounds may start while load comes, and after it only if more rounds are wanted and run.linger_s lasts.

    They do not start with the first requests: what serving takes must be known before its slack is. Where requests are
    too rare to learn it, there is enough slack.
    """
    if facts.phase is Phase.OPEN:
        known = facts.latency_known or now - facts.entered_s >= config.control.window_s
        return known or not config.run.adaptive
    return facts.phase is Phase.LINGER and facts.wants_rounds and now - facts.entered_s < config.run.linger_s


def _unfinished(waited: float, facts: Facts, config: Config) -> str:
    """Why the phase is not through yet; empty if it is."""
    if facts.phase is Phase.GATHER and facts.missing:
        return f"waiting for replicas {list(facts.missing)}"
    if facts.phase in (Phase.BASELINE, Phase.CLOSING) and (facts.measuring or facts.outstanding):
        return "measuring quality"
    if facts.phase is Phase.CLOSING and facts.scoring:
        return "scoring answers"
    if facts.phase is Phase.OPEN and not facts.exhausted:
        return f"{facts.load_left} requests to come" if facts.load_left else "requests may still come"
    if facts.phase is Phase.DRAIN and waited < config.run.drain_s:
        if facts.outstanding:
            return f"{facts.outstanding} requests outstanding"
        return "a round is about to end" if facts.federating else ""
    if facts.phase is Phase.LINGER:
        if facts.outstanding:
            return f"{facts.outstanding} requests outstanding"
        # When linger_s is over the server has the round averaged and judged, or discards it if that takes too long;
        # either takes its members a moment to settle.
        if facts.federating and waited < config.run.linger_s + 2 * config.federation.settle_timeout_s:
            return "a round is under way"
        if facts.wants_rounds and waited < config.run.linger_s:
            return "more rounds are wanted"
    return ""
