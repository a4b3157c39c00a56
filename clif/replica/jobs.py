"""Resumable jobs: training work that runs slice by slice between serving ticks. Free of torch."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any


class Job:
    """A generator that yields a description of its next slice before it does it.

    upcoming: the next slice, or None when the job is through.
    """

    def __init__(self, name: str, work: Generator[Any, None, Any]) -> None:
        self.name, self._work = name, work
        self.upcoming: Any = None
        self.run()

    def run(self) -> None:
        """Do the upcoming slice. What it raises ends the job."""
        self.upcoming = next(self._work, None)

    def close(self) -> None:
        """Give up: `finally` blocks of the work still run."""
        self._work.close()
        self.upcoming = None
