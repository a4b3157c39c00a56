"""Which replica answers a request: the least predicted finish time among those that meet its deadline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Union

from clif.config import Config
from clif.control.policy.view import ClusterView, ReplicaView
from clif.states import ReplicaState
from clif.types import Request


@dataclass(frozen=True)
class Dispatch:
    """Hand the request to this replica; predicted_s: seconds from now until its last token."""

    replica: int
    predicted_s: float


@dataclass(frozen=True)
class Reject:
    """End the request: no replica can meet its deadline and slo.late says reject."""

    predicted_s: float


Route = Union[Dispatch, Reject]


def choose_replica(
    now: float, request: Request, arrival_s: float, view: ClusterView, config: Config
) -> tuple[Route | None, str]:
    """Decide about the request at the head of the queue. None: it waits until a replica has room.

    Never drops: a request is dispatched, waits, or is rejected with the reason.
    """
    alive = view.serving
    if not alive:
        return None, "no replica that serves is alive"
    tokens = tokens_of(request)
    ranked = sorted((predict_s(request, r, config), r.outstanding, r.replica) for r in alive if r.has_room(tokens))
    left = math.inf if request.slo.deadline_s is None else arrival_s + request.slo.deadline_s - now
    if ranked and ranked[0][0] <= left:
        predicted, _, replica = ranked[0]
        return Dispatch(replica, predicted), f"least predicted finish of {len(ranked)} with room"
    best = ranked[0][0] if ranked else min(predict_s(request, r, config) for r in alive)
    if best > left and config.slo.late == "reject":
        return Reject(best), f"needs {best:.2f} s but its deadline is in {left:.2f} s"
    if not ranked:
        return None, f"none of {len(alive)} replicas has room"
    return Dispatch(ranked[0][2], best), f"deadline in {left:.2f} s cannot be met: served late"


def predict_s(request: Request, replica: ReplicaView, config: Config) -> float:
    """Predicted seconds until the last token: prefill chunks and one iteration per token beside those running."""
    training = replica.micro_batch if replica.state is ReplicaState.COMBINED else 0
    iteration = replica.serve.predict(replica.outstanding + 1, training)
    chunks = math.ceil(len(request.prompt) / config.engine.max_prefill_tokens)
    # Those it holds beyond the running batch have their prefill still to come.
    ahead = max(0, replica.outstanding - replica.running)
    return (chunks + ahead + request.sampling.max_tokens) * iteration


def tokens_of(request: Request) -> int:
    """Tokens that the request may fill in a KV cache."""
    return len(request.prompt) + request.sampling.max_tokens
