"""The samples of a job on their way to the replicas: which are held out, and which replica gets which.

Both are generators that read one piece at a time: the control process takes a step of them between its other work.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

from clif.jobs.model import Job
from clif.jobs.samples import held_out, pieces, prompt_digest, samples_path
from clif.jobs.store import JobStore
from clif.types import CLIF, TrainSample
from clif.wire.messages import JobData

Pieces = Iterable[list[TrainSample]]


@dataclass(frozen=True)
class Survey:
    """What a job's files hold. held: digests of the prompts that are held out; None: a file of its own holds them.

    both: the only prompt is both trained on and held out.
    """

    train_rows: int
    gate_rows: int
    gate_tokens: int
    longest: int
    held: frozenset[int] | None
    both: bool = False

    def trains(self, digest: int) -> bool:
        return self.held is None or self.both or digest not in self.held

    def judges(self, digest: int) -> bool:
        return self.held is not None and digest in self.held


@dataclass(frozen=True)
class Samples:
    """Where the samples of a job are, read again by every call."""

    store: JobStore
    job: Job

    def train(self) -> Pieces:
        if self.job.from_feedback:
            return [list(self.store.feedback_samples(self.job.id))]
        return self._file(self.job.training_file)

    def gate(self) -> Pieces:
        """Of the validation file; none without it."""
        return self._file(self.job.validation_file) if self.job.validation_file else ()

    def _file(self, file: str) -> Pieces:
        assert self.store.run_dir is not None, "files need a folder"
        return pieces(samples_path(self.store.run_dir, file))


def survey(samples: Samples, share: float) -> Generator[None, None, Survey]:
    """Read everything once. Raises InputError for files that cannot be read.

    share: of the prompts that is held out, where there is no validation file.
    """
    seed, longest, gate = samples.job.hyperparameters.seed, 0, list[int]()
    for piece in samples.gate():
        gate += [sample.targets for sample in piece]
        longest = max([longest, *(len(sample.ids) for sample in piece)])
        yield
    seen: list[tuple[int, int]] = []
    for piece in samples.train():
        seen += [(prompt_digest(sample, seed), sample.targets) for sample in piece]
        longest = max([longest, *(len(sample.ids) for sample in piece)])
        yield
    if gate:
        return Survey(len(seen), len(gate), sum(gate), longest, None)
    held = held_out([digest for digest, _ in seen], share)
    targets = [count for digest, count in seen if digest in held]
    both = len(targets) == len(seen)
    return Survey(len(seen) if both else len(seen) - len(targets), len(targets), sum(targets), longest, held, both)


def deal(
    samples: Samples, found: Survey, trainers: tuple[int, ...], to: frozenset[int]
) -> Iterator[list[tuple[int, JobData]]]:
    """The messages for the replicas `to`, piece by piece; each replica's last one completes its data.

    Training rows go to the replicas that train in turn. So do held-out rows; few of them are shared by several.
    """
    job, seed = samples.job, samples.job.hyperparameters.seed
    index = {replica: i for i, replica in enumerate(trainers)}
    trained, judged = itertools.count(), itertools.count()

    def parts(train: list[TrainSample], gate: list[TrainSample]) -> list[tuple[int, JobData]]:
        mine, judges = [next(trained) % len(trainers) for _ in train], [next(judged) for _ in gate]
        made = []
        for replica in sorted(to):
            learns = tuple(s for s, i in zip(train, mine, strict=True) if i == index[replica])
            judged_by = tuple(s for s, j in zip(gate, judges, strict=True) if _has(index[replica], j, found, trainers))
            if learns or judged_by:
                made.append((replica, JobData(job=job.id, train=learns, gate=judged_by)))
        return made

    for piece in samples.gate():
        yield parts([], piece)
    for piece in samples.train():
        digests = [prompt_digest(sample, seed) for sample in piece]
        train = [s for s, digest in zip(piece, digests, strict=True) if found.trains(digest)]
        yield parts(train, [s for s, digest in zip(piece, digests, strict=True) if found.judges(digest)])
    rounds = tuple(done.round_id for done in samples.store.rounds(job.id, committed=True))
    last = JobData(job=job.id, seed=seed, own_gate=job.adapter == CLIF, rounds=rounds, complete=True)
    yield [(replica, last) for replica in sorted(to)]


def _has(index: int, row: int, found: Survey, trainers: tuple[int, ...]) -> bool:
    """Whether the trainer of this index judges by this held-out row: a round without any would be discarded."""
    if found.gate_rows < len(trainers):
        return row == index % found.gate_rows
    return row % len(trainers) == index
