"""The jobs that a rank trains, one at a time: each has its samples, its held-out rows, its moments and its checkpoints.

The shadow is no part of it: every round begins from the base version of its plan (clif/training/masters.py).

Invariant: all ranks of a replica get the same messages at the same step, so they switch together and to the same state.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from clif.config import ConfigError
from clif.data.cursor import Fingerprint
from clif.data.replay import with_replay
from clif.distributed.collectives import RoundBroken
from clif.engine.jobs import Slices
from clif.errors import InputError
from clif.training.checkpoint import CheckpointWriter, find_checkpoint
from clif.training.heldout import Heldout
from clif.training.train_runner import TrainRunner
from clif.training.trainer import JobTraining, ShadowTrainer
from clif.types import TrainSample
from clif.wire.messages import JobData

log = logging.getLogger(__name__)
OWN = ""
"""The run's own data."""


@dataclass
class JobState:
    """A job on this rank. parked: while another one trains."""

    gate: Heldout
    checkpoints: CheckpointWriter
    parked: JobTraining | None = None


@dataclass
class _Arriving:
    """Samples of which further pieces come."""

    train: list[TrainSample] = field(default_factory=list)
    gate: list[TrainSample] = field(default_factory=list)
    data: Fingerprint = field(default_factory=Fingerprint)


class JobSwitch:
    """current: the job whose samples and moments the trainer has. own: the run's own data."""

    def __init__(
        self,
        trainer: ShadowTrainer,
        own: JobState,
        own_gate: Sequence[TrainSample],
        folder: Path,
        rank: int,
        max_tokens: int,
    ) -> None:
        """own: the state of the run's own data. folder: of checkpoints. max_tokens: of one forward of held-out rows."""
        self.current, self.own = OWN, own
        self._trainer, self._own_gate, self._own_samples = trainer, own_gate, trainer.samples
        self._folder, self._rank, self._max_tokens = folder, rank, max_tokens
        self._states: dict[str, JobState] = {OWN: own}
        self._arriving: dict[str, _Arriving] = {}
        self._steps_of_dropped = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of all jobs."""
        waiting = sum(state.parked.steps for state in self._states.values() if state.parked is not None)
        return self._trainer.steps + waiting + self._steps_of_dropped

    def take(self, message: JobData) -> None:
        """Samples of a job have come. A job that is known keeps what it has."""
        if message.job in self._states:
            return
        pieces = self._arriving.setdefault(message.job, _Arriving())
        pieces.train += message.train
        pieces.data.add(message.train)
        pieces.gate += message.gate
        if not message.complete:
            return
        del self._arriving[message.job]
        gate = [*pieces.gate, *(self._own_gate if message.own_gate else ())]
        self._states[message.job] = self._begin(message, pieces, gate)

    def switch(self, job: str) -> Slices[JobState]:
        """The trainer goes on with a job. Raises RoundBroken, on all ranks, if its samples are not here or too long."""
        state = self._states.get(job)
        if state is None:
            raise RoundBroken(f"the samples of job {job} are not here")
        if job == self.current:
            return state
        assert state.parked is not None
        self._check(self._trainer.runner, state.parked.samples)
        former = yield from self._trainer.exchange(state.parked)
        if self.current in self._states:
            self._states[self.current].parked = former
        else:
            self._steps_of_dropped += former.steps
        self.current, state.parked = job, None
        return state

    def drop(self, job: str) -> None:
        """The job is over: what only further rounds would need is forgotten. A round of it under way can still end."""
        self._arriving.pop(job, None)
        state = self._states.pop(job, None)
        if state is not None:
            state.checkpoints.remove()
            self._steps_of_dropped += state.parked.steps if state.parked is not None else 0

    def wait(self) -> None:
        """Wait until no checkpoint is being written. Raises the error of a write."""
        for state in self._states.values():
            state.checkpoints.wait()

    def _begin(self, message: JobData, pieces: _Arriving, gate: list[TrainSample]) -> JobState:
        checkpoints = CheckpointWriter(self._folder, self._rank, message.job)
        state = JobState(Heldout(self._trainer.runner, gate, self._max_tokens), checkpoints)
        # What judges by the run's own held-out rows, too, is not to forget what its own rows taught.
        earlier = self._own_samples if message.own_gate else []
        samples = with_replay(pieces.train, earlier, self._trainer.config.replay, message.seed)
        state.parked = self._trainer.fresh(samples, message.seed, str(pieces.data))
        self._resume(state.parked, checkpoints, frozenset(message.rounds), message.job)
        return state

    def _resume(self, fresh: JobTraining, checkpoints: CheckpointWriter, rounds: Set[int], job: str) -> None:
        """Go on from the checkpoint of the job's last committed round that this rank took part in."""
        saved = find_checkpoint(checkpoints, rounds, self._trainer.bank.shadow.device)
        if saved is None:
            return
        if saved.trainer["shadow"].shape != self._trainer.bank.shadow.shape:
            log.warning("job %s: its checkpoint is of other parts of the model: it begins with fresh moments", job)
            return
        fresh.moments, fresh.steps = saved.trainer["moments"], saved.trainer["steps"]
        try:
            if fresh.cursor is not None:
                fresh.cursor.restore(saved.cursor)
        except InputError as error:
            log.warning("job %s: the order of its samples begins anew: %s", job, error)

    @staticmethod
    def _check(runner: TrainRunner, samples: Sequence[TrainSample]) -> None:
        try:
            runner.check_samples(max((len(sample.ids) for sample in samples), default=1))
        except ConfigError as error:
            raise RoundBroken(error) from error
