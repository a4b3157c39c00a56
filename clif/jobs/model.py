"""The records of training jobs, files and feedback, and how a job's status may change. Free of torch.

Stamps are seconds since 1970: they outlive processes.
"""

from __future__ import annotations

import enum

import msgspec

from clif.errors import InputError
from clif.types import CLIF, TrainSample

STANDING = ""
"""The standing job: the run's own data set. It has no record in lists and cannot be cancelled."""
HIGHEST_PRIORITY = 9


class JobStatus(enum.StrEnum):
    """Life of a training job, in the words of OpenAI's interface."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})
_ENDS = ENDED | {JobStatus.PAUSED}
JOB_TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATING_FILES: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING}) | _ENDS,
    JobStatus.RUNNING: _ENDS,
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}
"""A paused job may succeed: the round that was under way when it was paused may complete it."""


class UnknownId(InputError):
    """There is no file or job of this id."""


class Conflict(InputError):
    """What is asked for does not fit the present state: a job that has ended, a file that a job still needs."""


class LimitReached(InputError):
    """A bound of the section `jobs` is reached: too many jobs, or too much feedback that waits."""


def advance_job(current: JobStatus, target: JobStatus) -> JobStatus:
    """target, if a job of this status may become it. Raises Conflict otherwise."""
    if target not in JOB_TRANSITIONS[current]:
        raise Conflict(f"the job is {current.value}: it cannot become {target.value}")
    return target


class JobFile(msgspec.Struct, frozen=True, kw_only=True):
    """An uploaded file. Its rows are in RUN/files/<id>.jsonl, their samples in RUN/files/<id>.samples.

    rows: usable samples; tokens: of all of them; longest: tokens of the longest. owner: name of the key that sent it.
    """

    id: str
    filename: str
    bytes: int
    rows: int
    tokens: int
    longest: int
    created_s: float
    purpose: str = "fine-tune"
    owner: str = ""


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """What a job may choose. batch_size: samples of an optimizer step of a replica; 0: as the run is configured.

    learning_rate_multiplier: of train.lr. max_rounds: committed rounds at most; None: until n_epochs are trained.
    """

    n_epochs: int = 3
    batch_size: int = 0
    learning_rate_multiplier: float = 1.0
    seed: int = 0
    max_rounds: int | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A training job as it stands.

    adapter: name of the line of versions that it trains. training_file, validation_file: ids of files; both empty: its
    samples are feedback rows. samples: of its training part, 0 while they have not been read. weight, priority: of its
    share of the rounds. owner: name of the key that created it.

    status changes by advance_job() alone. counted: samples of committed rounds, each round once. trained_tokens: of all
    its rounds. served: tokens / weight, by which rounds are shared. completed, discarded, discarded_in_a_row, lr_scale:
    its rounds; discard_reason: of the last one that was discarded. base_version: the version that it began from;
    version: its last committed one, 0 for none.
    """

    id: str
    created_s: float
    adapter: str = CLIF
    status: JobStatus = JobStatus.VALIDATING_FILES
    training_file: str = ""
    validation_file: str = ""
    suffix: str = ""
    hyperparameters: Hyperparameters = Hyperparameters()
    weight: float = 1.0
    priority: int = 0
    owner: str = ""
    metadata: dict[str, str] = {}
    samples: int = 0
    counted: int = 0
    trained_tokens: int = 0
    served: float = 0.0
    completed: int = 0
    discarded: int = 0
    discarded_in_a_row: int = 0
    lr_scale: float = 1.0
    discard_reason: str = ""
    base_version: int = 0
    version: int = 0
    started_s: float | None = None
    finished_s: float | None = None
    error: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def from_feedback(self) -> bool:
        """Whether its samples are rows of feedback."""
        return not self.training_file and self.id != STANDING

    @property
    def wanted(self) -> int:
        """Samples that it wants to have trained on, over all epochs."""
        return self.samples * self.hyperparameters.n_epochs


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a job's story. type: "message", or "round" for what a round did; data: figures of it."""

    id: str
    created_s: float
    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, float | int | str | None] = {}


class JobRound(msgspec.Struct, frozen=True, kw_only=True):
    """A round of a job that is over. samples, tokens: of all members. version: the committed one, otherwise 0.

    train_loss: nats per answer token; candidate_loss, active_loss: of the held-out rows, nats per answer token.
    judged: whether the members voted.
    """

    round_id: int
    job: str
    ended_s: float
    committed: bool
    version: int = 0
    samples: int = 0
    tokens: int = 0
    steps: int = 0
    train_loss: float | None = None
    candidate_loss: float | None = None
    active_loss: float | None = None
    judged: bool = False
    reason: str = ""
    lr_scale: float = 1.0


class FeedbackRow(msgspec.Struct, frozen=True, kw_only=True):
    """A better answer. digest: of its content, so that it counts once. source: where it comes from, as the id of the
    response that it is about. owner: name of the key that sent it."""

    digest: str
    created_s: float
    sample: TrainSample
    source: str = ""
    owner: str = ""
