"""The last answers, so that feedback can name one by its id. In memory alone, and only where feedback is allowed."""

from __future__ import annotations

import re
import time
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass

from clif.config import JobsConfig
from clif.frontend.choices import Choices
from clif.frontend.quotas import Clock

_ID = re.compile(r"[a-z]+[-_](?P<number>[0-9a-f]{1,16})")


@dataclass(frozen=True)
class Remembered:
    """The answers of one call. owner: name of the key. prompts, texts: of each choice. at_s: of the clock."""

    owner: str
    model: str
    version: int
    prompts: tuple[array[int], ...]
    texts: tuple[str, ...]
    at_s: float


class RecentAnswers:
    """Bounded by number and age; the oldest ones are forgotten first."""

    def __init__(self, most: int, ttl_s: float, clock: Clock = time.monotonic) -> None:
        self._most, self._ttl_s, self._clock = most, ttl_s, clock
        self._kept: OrderedDict[int, Remembered] = OrderedDict()
        self.ratings: Counter[str] = Counter()
        """How often answers were rated up and down."""

    @classmethod
    def configured(cls, jobs: JobsConfig) -> RecentAnswers:
        return cls(jobs.feedback_answers if jobs.allow_feedback else 0, jobs.feedback_ttl_s)

    def __len__(self) -> int:
        return len(self._kept)

    def remember(self, choices: Choices, owner: str) -> None:
        """Answers that are whole."""
        if not self._most or not choices.ended:
            return
        given = choices.all
        self._kept[given[0].request.id] = Remembered(
            owner=owner,
            model=choices.asked.model,
            version=choices.version,
            prompts=tuple(array("I", choice.request.prompt) for choice in given),
            texts=tuple(choice.text.sent for choice in given),
            at_s=self._clock(),
        )
        self._forget()

    def find(self, response_id: str) -> Remembered | None:
        self._forget()
        match = _ID.fullmatch(response_id)
        return self._kept.get(int(match["number"], 16)) if match else None

    def _forget(self) -> None:
        oldest_s = self._clock() - self._ttl_s
        while self._kept:
            first = next(iter(self._kept.values()))
            if len(self._kept) <= self._most and first.at_s >= oldest_s:
                return
            self._kept.popitem(last=False)
