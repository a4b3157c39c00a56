"""Several processes of the same contender, each on cores of its own, that share the requests of a turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from turns import Contender, Limits, Outcome, Turn


@dataclass
class Instances(Contender):
    """members: one for each process; the part of the requests that each computes is their own matter."""

    members: Sequence[Contender]

    def start(self, limits: Limits) -> None:
        """Each gets an equal part of the cores."""
        width = len(limits.cores) // len(self.members)
        if width == 0:
            raise ValueError(f"{len(self.members)} instances need as many cores, not {len(limits.cores)}")
        for number, member in enumerate(self.members):
            member.start(replace(limits, cores=limits.cores[number * width : (number + 1) * width]))
        self.settings = self.members[0].settings
        self._take_failures()

    def begin(self, turn: Turn) -> None:
        for member in self.members:
            member.begin(turn)
        self._take_failures()

    def finish(self) -> tuple[Outcome, float] | None:
        """The turn took as long as its slowest part."""
        found = [member.finish() for member in self.members]
        self._take_failures()
        whole = [one for one in found if one is not None]
        if self.failed or len(whole) < len(found):
            return None
        results: Any = [outcome.result for outcome, _ in whole]
        slowest = max(outcome.seconds for outcome, _ in whole)
        return Outcome(slowest, [each for part in results for each in part]), sum(mib for _, mib in whole)

    def stop(self) -> None:
        for member in self.members:
            member.stop()

    def _take_failures(self) -> None:
        self.failed = next((member.failed for member in self.members if member.failed), "")
