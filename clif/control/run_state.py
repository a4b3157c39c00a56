"""Where a run is: its phase and the stamps of its course. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from clif.control.policy.phases import Phase


@dataclass
class RunState:
    """Changed by RunPhases alone; everything else reads it. Stamps are seconds of the server's clock.

    started_s: start of the run; the time that it took before a restart counts, the outage does not. entered_s: start of
    the phase. opened_s: stamp at which the load's own time is 0. began: whether all replicas joined in this process.
    """

    started_s: float
    entered_s: float
    opened_s: float
    phase: Phase = Phase.GATHER
    began: bool = False
