"""The nouns of CLIF: plain, frozen records that cross module and process borders. Free of torch.

Times are seconds. A stamp is comparable only with stamps of the same process (time.monotonic).
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

from clif.sampling_params import MOST_LOGPROBS, Sampling
from clif.sampling_params import Constraint as Constraint

Count = Annotated[int, Meta(ge=0, le=2**53)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Amount = Annotated[float, Meta(ge=0, le=1e9)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Share = Annotated[float, Meta(ge=0, le=1)]
LEAST_LOGPROB = -9999.0
Logprob = Annotated[float, Meta(ge=LEAST_LOGPROB, le=0)]
"""Bounds of numbers that come from another process: msgspec checks them when it decodes. None of the floats is NaN."""


class FinishReason(enum.StrEnum):
    """How a request ended. Every accepted request gets exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    FAILED = "failed"


class Purpose(enum.StrEnum):
    """The origin of a request: a user, or a probe by which CLIF measures the quality of its own answers."""

    USER = "user"
    PROBE = "probe"


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Latency promise of a request, in seconds. None: not promised."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None


ID_SPACE = 2**40
"""Size of each source's range of request ids: more than any source ever uses."""
CLIENTS = 4096
"""The first of the ranges of clients, above those of probes."""


def first_id(source: int) -> int:
    """First id of a source's range.

    0: the load of users, over all starts; 1 + n: the probes of start n; CLIENTS + n: requests of clients in start n.
    """
    return source * ID_SPACE


def of_client(request_id: int) -> bool:
    """Whether a request came from a client, over a connection that does not outlive the control process."""
    return request_id >= first_id(CLIENTS)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenised request. prompt holds token ids; id is unique within a run's folder, see first_id().

    version: the adapter version that answers it; None: the active version of adapter `clif`.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    slo: Slo = Slo()
    purpose: Purpose = Purpose.USER
    version: int | None = None

    @property
    def max_total_tokens(self) -> int:
        """Tokens of the prompt and of the longest answer, which it may fill in a KV cache."""
        return len(self.prompt) + self.sampling.max_tokens


class Waiting(msgspec.Struct, frozen=True, array_like=True):
    """A user's request that waits at the dispatcher, as a replica is told of it. wait_s: since it arrived."""

    id: int
    wait_s: float
    prompt_tokens: int
    max_tokens: int
    slo: Slo = Slo()


NO_TOKEN = -1
"""In place of a token id: the logits are not finite, so no token can be chosen."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token of an answer with its log-probability under the model, nats, and the likeliest tokens with theirs.

    Unlikely ones have LEAST_LOGPROB, which stands for minus infinity, too.
    """

    token: TokenId
    logprob: Logprob
    top: Annotated[tuple[tuple[TokenId, Logprob], ...], Meta(max_length=MOST_LOGPROBS)] = ()


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of a request, all computed by adapter `version`; finish is set on the last event only.

    logprobs: one for each token, if the request asks for them. prompt_logprobs: of the prompt's tokens after the first,
    with the first token of the answer.
    """

    request_id: Count
    tokens: tuple[TokenId, ...] = ()
    version: Count = 0
    finish: FinishReason | None = None
    detail: str = ""
    text: str | None = None
    """Final text when a stop string cut it; otherwise the receiver decodes the tokens."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class CoservingMode(enum.StrEnum):
    """How a replica trains while it serves (engine.coserving); AUTO: what suits the device."""

    AUTO = "auto"
    FUSED = "fused"
    CONCURRENT = "concurrent"
    INTERLEAVED = "interleaved"


class Regime(enum.StrEnum):
    """What a serving step shares the device with: nothing, a forward in its products, or a slice on other threads."""

    ALONE = "alone"
    FUSED = "fused"
    CONCURRENT = "concurrent"


class SlackLimit(enum.StrEnum):
    """What decides how long training may take before the next serving step."""

    NO_REQUEST = "no_request"
    FIRST_TOKEN = "first_token"
    NEXT_TOKEN = "next_token"
    DEADLINE = "deadline"
    FULL = "full"
    QUEUED = "queued"
    FUSE = "fuse"
    SHARE = "share"
    GAP = "gap"


_LIMITS = {
    SlackLimit.NO_REQUEST: "no request waits",
    SlackLimit.FULL: "as many requests run as may run at the same time, and whether others wait is not known",
    SlackLimit.QUEUED: "request {request} waits at the dispatcher: its first token has {ms:.0f} ms of slack",
    SlackLimit.FUSE: "a forward waits for a step to be fused with",
    SlackLimit.SHARE: "serving and training take turns: {ms:.0f} ms of training's share are left",
    SlackLimit.GAP: "gaps between tokens stay about as long as they are without training: {ms:.0f} ms of one are left",
    SlackLimit.FIRST_TOKEN: "first token of request {request} has {ms:.0f} ms of slack",
    SlackLimit.NEXT_TOKEN: "next token of request {request} has {ms:.0f} ms of slack",
    SlackLimit.DEADLINE: "deadline of request {request} has {ms:.0f} ms of slack",
}


class TrainingSlack(msgspec.Struct, frozen=True):
    """Seconds that training may take before the next serving step, and what allows no more; request: -1 for none.

    It is made at every step, so its sentence is made only where it is shown.
    """

    seconds: float
    limit: SlackLimit
    request: int = -1

    @property
    def reason(self) -> str:
        return _LIMITS[self.limit].format(ms=self.seconds * 1000, request=self.request)


class TrainSample(msgspec.Struct, frozen=True, kw_only=True):
    """One tokenised training sample. Tokens from target_start on carry loss; `id` is its row in the data set."""

    id: int
    ids: tuple[int, ...]
    target_start: int

    @property
    def targets(self) -> int:
        """Number of tokens that carry loss."""
        return len(self.ids) - self.target_start


CLIF = "clif"
"""The adapter that answers requests which name no other one, and that the run's own data train."""


def pinned_name(adapter: str, number: int) -> str:
    """What a request names to be answered by this version of an adapter, and by no other."""
    return f"{adapter}@v{number:04d}"


class AdapterVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A promoted adapter. Version 0 is the base model; numbers only grow; weights never change afterwards.

    round_id: the round that made it; 0: none did, it was loaded from a folder. heldout_loss: nats per answer token, on
    the rows that judged it; None: not measured. adapter: the name of its line of
    versions; parent: the version that its training began from, 0: the base. job: whose rounds trained it; empty: the
    run's own data. created_unix: when it was stored, seconds of the wall clock; 0: not known.
    """

    number: int
    round_id: int
    heldout_loss: float | None
    adapter: str = CLIF
    parent: int = 0
    job: str = ""
    created_unix: float = 0.0


Members = tuple[tuple[int, ...], tuple[int, ...]]
"""Member replicas of a round, and how often each of them had been rebuilt by then."""
GROUPS_KEPT = 8
"""Process groups of rounds that a rank keeps, for as many member sets."""


class RoundPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The work of the members of a federated round.

    members: replica ids, sorted. incarnations: how often each of them has been rebuilt.
    local_steps: optimizer steps per member at this micro_batch; each takes micro_batch x accumulation samples.
    base_version: the shadow of each member begins from it, and the average is judged against it.
    lr_scale: what train.lr is multiplied by. job: whose data are trained; empty: the run's own. adapter: the name that
    the promoted version belongs to.
    """

    round_id: int
    members: tuple[int, ...]
    incarnations: tuple[int, ...]
    local_steps: int
    micro_batch: int
    accumulation: int
    base_version: int
    lr_scale: float = 1.0
    job: str = ""
    adapter: str = CLIF

    @property
    def member_set(self) -> Members:
        return self.members, self.incarnations

    @property
    def samples(self) -> int:
        """Samples of each member. A change of the micro-batch changes the number of steps instead."""
        return self.local_steps * self.micro_batch * self.accumulation


class RoundResult(msgspec.Struct, frozen=True, kw_only=True):
    """The local steps of one member. samples is its FedAvg weight; noise_scale is in samples (or None).

    loss: mean over the answer tokens of all its steps, nats; targets: how many these are, so that the means of all
    members can be pooled. tokens: with those of the prompts. Steps that were not finite count nowhere.
    """

    round_id: int
    replica: Count
    samples: Count
    tokens: Count
    targets: Count
    steps: Count
    loss: float
    finite: bool
    noise_scale: float | None = None
    seconds: Seconds = 0.0


class Vote(msgspec.Struct, frozen=True, kw_only=True):
    """A member's judgement of the averaged adapter on its part of the held-out rows.

    Losses are sums over answer tokens, in nats, so that the parts of all members can be pooled.
    error2, product2: squared norms, over the layers assigned to this member, of the error of averaging A and B
    separately, sum_i w_i (B_i - Bbar)(A_i - Abar), and of Bbar Abar. They add up over all members.
    outer_step: how far the candidate lies from the base version to the average, as a share of the way.
    """

    round_id: int
    replica: Count
    finite: bool
    candidate_loss: float
    active_loss: float
    tokens: Count
    error2: float | None = None
    product2: float | None = None
    outer_step: float = 1.0


class HeldoutLoss(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out loss of the active version on this replica's part: sum over `tokens` answer tokens, in nats."""

    replica: Count
    version: Count
    loss: float
    tokens: Count
