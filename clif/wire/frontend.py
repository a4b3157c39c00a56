"""Every message between the control process and the HTTP front end. Free of torch.

Both directions are tagged unions: the tag is the class name. They travel over the control port, under a key of the
front end's own, so that no replica can speak for it, and it for no replica.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import Meta

from clif.types import CLIF, Count, Request, Share, TokenEvent, TrainSample

FRONTEND = -1
"""Sender of the front end's messages, beside the numbers of the replicas."""
BEAT_S = 1.0
"""Between two signs of life of the front end."""
LONGEST_REASON, LONGEST_PATH = 200, 1024
Name = Annotated[str, Meta(min_length=1, max_length=64)]
FolderPath = Annotated[str, Meta(min_length=1, max_length=LONGEST_PATH)]
Kind = Literal["invalid", "not_found", "conflict", "forbidden", "too_many", "not_ready", "failed"]
"""Why something is refused: the front end makes status and type of its answer from it."""


class FrontendMessage(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages."""


class Problem(msgspec.Struct, frozen=True):
    """Why something is refused. param: the argument that is to change, if it is one."""

    kind: Kind
    message: str
    param: str | None = None


class Refused(Exception):
    """A command or a request that cannot be carried out. Its handler raises it, and the client gets the problem."""

    def __init__(self, kind: Kind, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(kind, message, param)


# --- commands --------------------------------------------------------------------------------------------------------


class Action(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what an operator or a client asks of the control process beside answers."""


class GetConfig(Action, frozen=True):
    """The configuration as run."""


class PauseTraining(Action, frozen=True):
    """No round begins until training is resumed. reason: as it is shown; empty: none is given."""

    reason: Annotated[str, Meta(max_length=LONGEST_REASON)] = ""


class ResumeTraining(Action, frozen=True):
    """Rounds may begin again."""


class DrainReplica(Action, frozen=True):
    """The replica gets no new request and joins no round; what it has begun goes on. reason: as in PauseTraining."""

    replica: Count
    reason: Annotated[str, Meta(max_length=LONGEST_REASON)] = ""


class UndrainReplica(Action, frozen=True):
    """Requests and rounds may use the replica again."""

    replica: Count


class ListVersions(Action, frozen=True):
    """All adapter versions, and what the operator chose."""


class RollBack(Action, frozen=True):
    """Make a stored version the active one of its adapter; 0: `adapter` answers as the base."""

    version: Count
    adapter: Name = CLIF


class RetireAdapter(Action, frozen=True):
    """Give up an adapter and its name."""

    adapter: Name


class SetCanary(Action, frozen=True):
    """Let a version answer this share of the requests to `clif`."""

    version: Count
    share: Share


class ClearCanary(Action, frozen=True):
    """Let the active version answer all of them."""


class PinVersion(Action, frozen=True):
    """Keep a version."""

    version: Count


class UnpinVersion(Action, frozen=True):
    version: Count


class LoadAdapter(Action, frozen=True):
    """Make a version of `adapter` from a PEFT folder. path: below serve.adapter_root."""

    path: FolderPath
    adapter: Name = CLIF


class ExportVersion(Action, frozen=True):
    """Copy a version to a new folder. path: as in LoadAdapter."""

    version: Count
    path: FolderPath


class OfClient(Action, frozen=True):
    """An action about what clients create. sees: a user's key is shown only what it has created; None: an admin."""

    sees: str | None = None


class RegisterFile(OfClient, frozen=True, kw_only=True):
    """A file whose rows and samples lie in RUN/files. The fields are those of JobFile in clif/jobs/model.py."""

    id: str
    filename: str
    bytes: int
    rows: int
    tokens: int
    longest: int
    owner: str = ""


class GetFile(OfClient, frozen=True, kw_only=True):
    id: str


class ListFiles(OfClient, frozen=True, kw_only=True):
    """The newest first. after: id of the last one of the page before."""

    limit: int
    after: str | None = None


class DeleteFile(OfClient, frozen=True, kw_only=True):
    id: str


class CreateJob(OfClient, frozen=True, kw_only=True):
    """A training job. model: where it begins. The other fields are those of Job and Hyperparameters."""

    model: str
    training_file: str
    validation_file: str = ""
    suffix: str = ""
    n_epochs: int = 3
    batch_size: int = 0
    learning_rate_multiplier: float = 1.0
    seed: int = 0
    max_rounds: int | None = None
    weight: float = 1.0
    priority: int = 0
    metadata: dict[str, str] = {}
    owner: str = ""


class GetJob(OfClient, frozen=True, kw_only=True):
    id: str


class ListJobs(OfClient, frozen=True, kw_only=True):
    """As ListFiles."""

    limit: int
    after: str | None = None


class ChangeJob(OfClient, frozen=True, kw_only=True):
    id: str
    change: Literal["cancel", "pause", "resume"]


class ListJobEvents(OfClient, frozen=True, kw_only=True):
    """Of the job `id`; as ListFiles."""

    id: str
    limit: int
    after: str | None = None


class ListCheckpoints(OfClient, frozen=True, kw_only=True):
    """Committed rounds of the job `id`; as ListFiles. after: number of a version."""

    id: str
    limit: int
    after: int | None = None


class GiveFeedback(Action, frozen=True):
    """A better answer. The fields are those of FeedbackRow in clif/jobs/model.py."""

    digest: str
    sample: TrainSample
    source: str = ""
    owner: str = ""


OfOperators = Union[
    GetConfig,
    PauseTraining,
    ResumeTraining,
    DrainReplica,
    UndrainReplica,
    ListVersions,
    RollBack,
    RetireAdapter,
    SetCanary,
    ClearCanary,
    PinVersion,
    UnpinVersion,
    LoadAdapter,
    ExportVersion,
]
OfClients = Union[
    RegisterFile,
    GetFile,
    ListFiles,
    DeleteFile,
    CreateJob,
    GetJob,
    ListJobs,
    ChangeJob,
    ListJobEvents,
    ListCheckpoints,
    GiveFeedback,
]
Actions = Union[OfOperators, OfClients]


# --- front end to control --------------------------------------------------------------------------------------------


class Started(FrontendMessage, frozen=True):
    """First message of a front end: it can answer."""

    pid: int


class Beat(FrontendMessage, frozen=True):
    """The front end runs; sent every BEAT_S."""


class Ask(FrontendMessage, frozen=True):
    """A request to answer. model: as the client named it. key: name of the client's key; empty: none was needed."""

    request: Request
    model: str
    key: str = ""


class Withdraw(FrontendMessage, frozen=True):
    """The client no longer waits for this request. reason: why, for the tables."""

    request_id: int
    reason: str


class Command(FrontendMessage, frozen=True):
    """An action. id: of the front end's choice, for the reply. key: as in Ask."""

    id: int
    action: Actions
    key: str = ""


# --- control to front end --------------------------------------------------------------------------------------------


class Refusal(msgspec.Struct, frozen=True):
    """A request that was not accepted."""

    request_id: int
    problem: Problem


class Answers(FrontendMessage, frozen=True):
    """What one step of the control process has for its clients.

    restarted: requests whose answer begins again, under another version; their events follow in the same message.
    """

    events: tuple[TokenEvent, ...] = ()
    restarted: tuple[int, ...] = ()
    refused: tuple[Refusal, ...] = ()


class Reply(FrontendMessage, frozen=True):
    """The outcome of a command: JSON, or why it was refused."""

    id: int
    body: bytes = b"null"
    problem: Problem | None = None


class Status(FrontendMessage, frozen=True):
    """The run as it is now. ready: requests are accepted; otherwise reason says why not.

    body: JSON, see clif/control/run_status.py; what lists of models, metrics and the live page show.
    """

    ready: bool
    reason: str
    body: bytes


class Leave(FrontendMessage, frozen=True):
    """The run is over: end what is open, close the port, and leave."""


FromFrontend = Union[Started, Beat, Ask, Withdraw, Command]
ToFrontend = Union[Answers, Reply, Status, Leave]
_FROM = msgspec.msgpack.Decoder(FromFrontend)
_TO = msgspec.msgpack.Decoder(ToFrontend)


def decode_from_frontend(payload: bytes) -> FromFrontend:
    """Raises msgspec.DecodeError on anything else."""
    return _FROM.decode(payload)


def decode_to_frontend(payload: bytes) -> ToFrontend:
    """Raises msgspec.DecodeError on anything else."""
    return _TO.decode(payload)


def as_json(value: Any) -> bytes:
    """The body of a reply or a status."""
    return msgspec.json.encode(value)
