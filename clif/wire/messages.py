"""Every message between the control process and the replica leaders. Free of torch.

Down = control to leader, Up = leader to control. Both are tagged unions: the tag is the class name.
Messages of one sender arrive in the order in which they were sent.

The types here and in clif/types.py bound what a leader may send: a message with a number outside of its bounds cannot
be decoded. Bounds that depend on the run are checked in clif/control/claims.py.
"""

from __future__ import annotations

from typing import Union

import msgspec

from clif.types import (
    CLIF,
    Amount,
    Count,
    HeldoutLoss,
    Request,
    RoundPlan,
    RoundResult,
    Seconds,
    Share,
    Size,
    TokenEvent,
    TrainingSlack,
    TrainSample,
    Vote,
    Waiting,
)


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages."""


# --- control to leader ---------------------------------------------------------------------------


class Submit(Message, frozen=True):
    """A request to answer. output_ids: what a failed replica has answered so far. version: the adapter's, for these."""

    request: Request
    output_ids: tuple[int, ...] = ()
    version: int | None = None


class Cancel(Message, frozen=True):
    request_id: int


class Limits(Message, frozen=True):
    """Batch bounds chosen by the coordinator: running requests at most, and samples per micro-batch."""

    max_batch: int
    micro_batch: int


class Backlog(Message, frozen=True):
    """Requests of users that wait for a slot in any replica's batch: this replica's share, and the first of the share.

    Sent to members of a round: when it changes, and again every second (clif/control/policy/backlog_updates.py). Times
    are ages: two processes never compare their clocks.
    """

    waiting: int = 0
    oldest: tuple[Waiting, ...] = ()


class BeginRound(Message, frozen=True):
    """group: number of the process group in which the members average; they create it if the number is new."""

    plan: RoundPlan
    group: int


class JobData(Message, frozen=True):
    """Samples of a training job for this replica, a piece of them: to train on, and of the held-out rows.

    The last piece completes them and says with which seed they are drawn. own_gate: the replica's own held-out rows
    judge candidates of the job as well. rounds: of the job that were committed, of one of which there may be a
    checkpoint.
    """

    job: str
    train: tuple[TrainSample, ...] = ()
    gate: tuple[TrainSample, ...] = ()
    seed: int = 0
    own_gate: bool = False
    rounds: tuple[int, ...] = ()
    complete: bool = False


class JobOver(Message, frozen=True):
    """No further round of this job comes: its samples and its training state are not needed any more."""

    job: str


class FinishSteps(Message, frozen=True):
    """Stop local steps and report: the round's time is up. A step under way is cut, and its samples come again."""

    round_id: int


class Aggregate(Message, frozen=True):
    round_id: int


class Settle(Message, frozen=True):
    """End of a round. commit: make the averaged shadow version `version`; publisher sends it back."""

    round_id: int
    commit: bool
    version: int
    publish: bool = False


class Install(Message, frozen=True):
    """An adapter version for a replica that does not hold it. weights: safetensors bytes in PEFT naming.

    activate: a version of adapter `clif` becomes the active one. Otherwise it is kept, unless a Keep since leaves it
    out.
    """

    version: int
    weights: bytes
    round_id: int = -1
    activate: bool = True
    adapter: str = CLIF


class Keep(Message, frozen=True):
    """Exactly these versions are kept, besides the active one and those that requests still read.

    One that is not held yet comes in an Install afterwards.
    """

    versions: tuple[int, ...]


class Activate(Message, frozen=True):
    """Answer new requests with this version, which is held here, or with 0, the base model: roll back."""

    version: int


class Evaluate(Message, frozen=True):
    """Report the held-out loss of the active version."""


class Ping(Message, frozen=True):
    """Nothing to do: that it can be sent shows that the replica's process is there."""


class Rebuild(Message, frozen=True):
    """The replica was declared lost or sent something impossible. Its requests were reassigned: it must rebuild."""

    reason: str


class Welcome(Message, frozen=True):
    """To a rebuilt replica: what was sent before this was addressed to an earlier incarnation."""

    incarnation: int


class Stop(Message, frozen=True):
    """Close files and leave. Sent when no request is outstanding, or none can be answered any more.

    code: exit code of the ranks; 0 if the run is complete.
    """

    code: int = 0


# --- leader to control ---------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message of a leader, and again when its replica was rebuilt. Token and KV capacities are in tokens.

    vocabulary: token ids are below it. adapter: the tensors of a promoted adapter, as describe() in
    clif/adapters/peft_files.py writes them. heldout_rows: rows on which it measures quality. incarnation: how often it
    was rebuilt. version: of the adapter that answers new requests; versions: all that it holds, as in Held.
    """

    replica: Count
    rank: Count
    host: str
    pid: Count
    max_batch: Size
    kv_tokens: Size
    max_context: Size
    vocabulary: Size
    adapter: str
    heldout_rows: Count
    dtype: str
    load_s: Seconds
    incarnation: Count = 0
    version: Count = 0
    versions: tuple[Count, ...] = ()


class Tokens(Message, frozen=True):
    replica: Count
    events: tuple[TokenEvent, ...]


class Report(Message, frozen=True):
    """State of the replica, sent a few times a second; also its sign of life.

    busy: share of the interval since the last report in which serving work ran (0 to 1).
    serve_timings / train_timings: (running requests, micro-batch in progress or 0, seconds) of steps and
    (micro-batch, running requests, seconds of training work) of micro-batches, to fit latency models.
    last_loss: of the last optimizer step, nats per answer token; None before the first.
    slack: what last limited training since the report before; None if nothing did.
    """

    replica: Count
    running: Count
    waiting: Count
    kv_used: Count
    busy: Share
    version: Count
    training_steps: Count
    last_loss: float | None
    serve_timings: tuple[tuple[Amount, Amount, Seconds], ...] = ()
    train_timings: tuple[tuple[Amount, Amount, Seconds], ...] = ()
    slack: TrainingSlack | None = None


class StepsDone(Message, frozen=True):
    result: RoundResult


class Voted(Message, frozen=True):
    vote: Vote


class RoundFailed(Message, frozen=True):
    """A member cannot continue the round (say: the all-reduce failed); it still serves."""

    round_id: int
    replica: Count
    error: str


class Published(Message, frozen=True):
    """The promoted adapter, sent by the round's publisher: PEFT adapter_config.json and safetensors bytes."""

    replica: Count
    version: Count
    round_id: int
    config_json: str
    weights: bytes


class Settled(Message, frozen=True):
    """The replica answers new requests with `version` from engine step `step` on. One that a round made for another
    adapter than `clif` it holds from then on, for requests that ask for it."""

    replica: Count
    round_id: int
    version: Count
    step: Count


class Held(Message, frozen=True):
    """Versions that requests may ask the replica for, besides 0: the active one and the kept ones. Sent when they
    change."""

    replica: Count
    versions: tuple[Count, ...]


class Evaluated(Message, frozen=True):
    result: HeldoutLoss


class Trouble(Message, frozen=True):
    """The replica met an error that stops serving; it leaves, or rebuilds and says Hello again.

    returning: it rebuilds. gone: the error is that a peer is lost.
    """

    replica: Count
    error: str
    returning: bool = False
    gone: bool = False


class Signalled(Message, frozen=True):
    """The replica's process got a signal to end (say from torchrun); it waits for Stop for the length of a drain."""

    replica: Count
    signal: str


class Goodbye(Message, frozen=True):
    """Last message of a leader: its files are closed."""

    replica: Count


Down = Union[
    Submit,
    Cancel,
    Limits,
    Backlog,
    BeginRound,
    JobData,
    JobOver,
    FinishSteps,
    Aggregate,
    Settle,
    Install,
    Keep,
    Activate,
    Evaluate,
    Ping,
    Rebuild,
    Welcome,
    Stop,
]
Up = Union[
    Hello,
    Tokens,
    Report,
    StepsDone,
    Voted,
    RoundFailed,
    Published,
    Settled,
    Held,
    Evaluated,
    Trouble,
    Signalled,
    Goodbye,
]


def sender_of(message: Up) -> int:
    """Replica that a message names as its sender."""
    if isinstance(message, StepsDone | Evaluated):
        return message.result.replica
    return message.vote.replica if isinstance(message, Voted) else message.replica
