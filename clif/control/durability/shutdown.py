"""What may end a run early: a signal, a dead parent, a lost replica that the launcher will restart."""

from __future__ import annotations

import signal
from collections.abc import Callable

from clif.control.durability.recovery import hands_over
from clif.control.policy.phases import ControlError, Phase
from clif.wire.messages import Signalled

DRAINED = 128 + signal.SIGTERM
"""Exit code after a signal: every request has its end, but the run is not through."""


class ShutdownPolicy:
    """Watches for reasons to end and knows what they mean for open requests.

    stop_reason: why the run must end now (a dead parent). signalled: why it is to drain. Both are empty otherwise.
    restarts_left: how often the launcher will still restart all ranks. drain: why the run drains; empty: it does not.
    """

    def __init__(
        self,
        stop_reason: Callable[[], str] = lambda: "",
        signalled: Callable[[], str] = lambda: "",
        restarts_left: int = 0,
    ) -> None:
        self.drain = ""
        self.restarts_left = restarts_left
        self._stop_reason, self._signalled = stop_reason, signalled
        self._drain_reason = ""
        self._lost = False

    def check(self, phase: Phase) -> None:
        """Once per step. Raises ControlError when the run must end without a drain."""
        # While the ranks leave, rank 0 may be the first, and nothing is left to lose.
        if phase is Phase.STOPPING:
            return
        reason = self._stop_reason()
        if reason:
            raise ControlError(reason)
        self.drain = self.drain or self._signalled() or self._drain_reason
        if self.drain and phase is Phase.GATHER and self.restarts_left:
            raise ControlError(f"{self.drain} while replicas loaded")

    def on_signalled(self, now: float, message: Signalled) -> None:
        """A rank got a signal. One is enough: launchers signal every rank, and rank 0's may come later."""
        self._drain_reason = self._drain_reason or f"replica {message.replica} got {message.signal}"

    def request_restart(self, phase: Phase, replica: int, reason: str, gone: bool) -> None:
        """Raises ControlError if a restart of all ranks is to replace the failed replica.

        gone: one of its processes has ended. While draining, only a dead process means that a restart follows; a
        replica that hangs or fails is one more reason to end.
        """
        if self.restarts_left and phase is not Phase.STOPPING and (gone or phase is not Phase.DRAIN):
            self._lost = True
            raise ControlError(f"replica {replica} is lost ({reason})")

    def leaves_open(self, phase: Phase) -> bool:
        """Whether open requests are left to the next start instead of being ended."""
        return hands_over(self.restarts_left, phase is Phase.GATHER, phase is Phase.DRAIN, self._lost)
