"""Training jobs in their order, and the execution of slices of the first one. Free of torch.

Invariants: one slice is under way at a time; the error of a slice costs its job and no request. Hence it is kept until
the step can raise it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

from clif.engine.jobs import WAIT, Job, Slice

log = logging.getLogger(__name__)


class SliceThread(Protocol):
    """Computes one slice at a time while serving goes on: on a thread of the host, or on a stream of the device.

    always: also while nothing is served.
    """

    always: ClassVar[bool]

    def start(self, work: Callable[[], Any]) -> None: ...

    def poll(self, wait: bool = False) -> tuple[Any, float] | None:
        """(result, seconds) of a finished slice, once; with wait, after waiting for it. Raises the slice's error."""
        ...

    def close(self) -> None: ...


class JobQueue:
    """thread: runs slices concurrently with serving, if there is one."""

    def __init__(self, thread: SliceThread | None = None) -> None:
        self.thread = thread
        self._jobs: deque[Job] = deque()
        self._under_way: tuple[Slice, int] | None = None
        self._error: RuntimeError | None = None

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, index: int) -> Job:
        return self._jobs[index]

    def append(self, job: Job) -> None:
        self._jobs.append(job)

    @property
    def under_way(self) -> bool:
        """Whether a slice runs on the thread."""
        return self._under_way is not None

    @property
    def always_started(self) -> bool:
        """Whether slices are started on the thread also while nothing is served."""
        return self.thread is not None and self.thread.always

    @property
    def ready(self) -> bool:
        """Whether a slice can be computed now."""
        return not self.under_way and any(job.upcoming not in (None, WAIT) for job in self._jobs)

    @property
    def upcoming(self) -> Slice | None:
        """The next slice; None without one, or while one is under way."""
        while self._jobs and self._jobs[0].upcoming is None:
            self._jobs.popleft()
        return self._jobs[0].upcoming if self._jobs and not self.under_way else None

    def run(self, units: int) -> None:
        """Compute `units` of the upcoming slice in this thread. Raises the slice's error."""
        self._jobs[0].run(units)

    def start(self, units: int) -> None:
        """Compute `units` of the upcoming slice on the thread; collect() takes the result."""
        piece, thread = self.upcoming, self.thread
        assert piece is not None and thread is not None
        self._under_way = piece, units
        thread.start(partial(piece.work, units))

    def collect(self) -> tuple[Slice, int, float] | None:
        """The slice that the thread has finished, its units and seconds; its job continues. None without one."""
        if self._under_way is None or self.thread is None:
            return None
        try:
            done = self.thread.poll()
        except RuntimeError as error:
            self._under_way = None
            self.fail(error)
            return None
        if done is None:
            return None
        (piece, units), self._under_way = self._under_way, None
        self.resume(done[0])
        return piece, units, done[1]

    def resume(self, result: object) -> None:
        """The upcoming slice was computed elsewhere. An error of the job is kept: it must not reach a serving step."""
        try:
            self._jobs[0].resume(result)
        except RuntimeError as error:
            self.fail(error)

    def fail(self, error: RuntimeError) -> None:
        """Keep the error of a slice until raise_error()."""
        self._error = error

    def raise_error(self) -> None:
        """Raise the kept error, if there is one."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def drop(self, name: str) -> None:
        """Cancel the jobs of this name, after their slice that is under way.

        Other jobs continue: repeating a slice of theirs would apply its layers twice.
        """
        try:
            self._wait_for(name)
        except RuntimeError:
            log.exception("a slice of job %s broke while the job was given up", name)
        for job in [job for job in self._jobs if job.name == name]:
            job.close()
            self._jobs.remove(job)

    def interrupt(self, name: str, why: Exception) -> None:
        """Raise `why` in the jobs of this name at their next slice, after one that is under way."""
        try:
            self._wait_for(name)
        except RuntimeError as error:
            self.fail(error)
            return
        for job in self._jobs:
            if job.name == name:
                job.interrupt(why)

    def _wait_for(self, name: str) -> None:
        """Wait for the slice that is under way, if its job has this name. Raises the slice's error."""
        if self._under_way is not None and self.thread is not None and self._jobs[0].name == name:
            self._under_way = None
            self.thread.poll(wait=True)

    def close(self) -> None:
        """Cancel all jobs; none of their slices runs afterwards."""
        for name in {job.name for job in self._jobs}:
            self.drop(name)
        if self.thread is not None:
            self.thread.close()
