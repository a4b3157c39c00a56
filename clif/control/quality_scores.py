"""Scores of the measurements of quality, one after the other, without the control loop waiting for any.

Cheap metrics are scored at once. With any other one, a measurement goes to a process (clif/quality/process.py): the
load begins meanwhile, and the run ends once the last scores are there or overdue.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clif.config import Config
from clif.control.policy.scoring import give_up_scoring
from clif.control.quality import Quality
from clif.control.records import Records
from clif.quality.process import Outcome, Scoring
from clif.quality.score import CHEAP, score
from clif.quality.work import ALL, Score, ScoringError, Testing, Work

log = logging.getLogger(__name__)
SHOWN = 32
"""Versions whose scores are shown while the run lasts: the latest."""


@dataclass(frozen=True)
class Waiting:
    """A measurement of a version that is to be scored. phase: before or after."""

    phase: str
    work: Work


class QualityScores:
    """latest: what is shown, a row for each measured version, oldest first."""

    def __init__(self, config: Config, scoring: Scoring, records: Records) -> None:
        self.latest: deque[dict[str, Any]] = deque(maxlen=SHOWN)
        self._config, self._scoring, self._records = config, scoring, records
        self._waiting: deque[Waiting] = deque()
        self._current: Waiting | None = None
        self._began_s = 0.0

    @property
    def pending(self) -> bool:
        return bool(self._current or self._waiting)

    def add(self, phase: str, measured: Quality) -> None:
        """Score a complete measurement, for each version that answered, usually one."""
        versions = set(measured.answers)
        if measured.heldout_tokens:
            versions.add(measured.version)
        for version in sorted(versions):
            self._waiting.append(Waiting(phase, work_of(version, measured, self._config)))

    def step(self, now: float) -> None:
        """Take what is complete, give up what is overdue, and begin the next one."""
        if self._current is not None:
            self._follow(now, self._current)
        while self._current is None and self._waiting:
            self._begin(now, self._waiting.popleft())

    def stop(self) -> None:
        """Await nothing any longer."""
        self._scoring.stop()
        self._waiting.clear()
        self._current = None

    def _begin(self, now: float, waiting: Waiting) -> None:
        if CHEAP.issuperset(waiting.work.metrics):
            self._take(waiting, scored(waiting.work))
            return
        try:
            self._scoring.start(waiting.work)
        except OSError as error:
            self._take(waiting, Outcome(error=f"its process cannot be started ({error.strerror})"))
            return
        self._current, self._began_s = waiting, now

    def _follow(self, now: float, current: Waiting) -> None:
        outcome = self._scoring.poll()
        if outcome is None:
            over, reason = give_up_scoring(now, self._began_s, self._config)
            if not over:
                return
            self._scoring.stop()
            outcome = Outcome(error=reason)
        self._current = None
        self._take(current, outcome)

    def _take(self, waiting: Waiting, outcome: Outcome) -> None:
        version = waiting.work.version
        if outcome.error:
            log.warning("answers of version %d are not scored: %s", version, outcome.error)
        self._records.scores(waiting.phase, version, outcome.scores)
        self.latest.append({"phase": waiting.phase, "version": version, **shown(outcome.scores)})


def work_of(version: int, measured: Quality, config: Config) -> Work:
    quality = config.quality
    known = version == measured.version and math.isfinite(measured.heldout_loss)
    return Work(
        version=version,
        metrics=quality.metrics,
        answers=tuple(sorted(measured.answers.get(version, ()), key=lambda answer: answer.row)),
        loss=measured.heldout_loss if known else None,
        loss_tokens=measured.heldout_tokens if known else 0,
        seed=config.run.seed,
        code_language=quality.code_language,
        testing=Testing(command=quality.test_command, timeout_s=quality.test_timeout_s),
    )


def scored(work: Work) -> Outcome:
    try:
        return Outcome(scores=tuple(score(work)))
    except ScoringError as error:
        return Outcome(error=str(error))


def shown(scores: Sequence[Score]) -> dict[str, Any]:
    """The figures of all answers, by metric, with their intervals and how many answers counted."""
    return {
        "scores": {
            one.metric: {"value": one.value, "low": one.low, "high": one.high, "count": one.count}
            for one in scores
            if one.group == ALL and one.finite
        }
    }
