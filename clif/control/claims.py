"""Checks of what a replica claims against what it was given. Pure functions: an objection says why a claim is false.

An empty objection means that the claim is possible, or that it concerns something that is over: replicas may be late.
Bounds that hold in every run are types of the messages, see clif/wire/messages.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clif.adapters.peft_files import config_flaw, weights_flaw
from clif.config import Config
from clif.control.dispatcher import RequestRecord
from clif.control.federation import Federation
from clif.control.fleet import Fleet
from clif.control.jobs import JobBoard
from clif.control.rounds import Round
from clif.control.versions import Versions
from clif.states import RequestState, RoundState
from clif.types import CLIF, FinishReason, HeldoutLoss, Request, RoundResult, TokenEvent, Vote
from clif.wire import messages as wire

Check = Callable[[Any], str]


class Claims:
    """The fleet knows which replicas there are, the federation which versions and rounds were given, and the versions
    which of them an operator went back to.

    most_tokens: answer tokens of its own that a replica can judge an adapter by, at most; jobs: those of jobs.
    """

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        federation: Federation,
        versions: Versions,
        most_tokens: int,
        jobs: JobBoard,
    ) -> None:
        self._config, self._fleet, self._federation = config, fleet, federation
        self._versions = versions
        self._checks: dict[type[wire.Message], Check] = {
            wire.Hello: self._hello,
            wire.Report: lambda m: newest_objection(m.version, federation.newest),
            wire.StepsDone: lambda m: steps_objection(m.result, federation.current, config),
            wire.Voted: lambda m: vote_objection(m.vote, federation.current, most_tokens + jobs.gate_tokens),
            wire.Published: self._published,
            wire.Settled: self._settled,
            wire.Held: lambda m: held_objection(m.versions, federation.newest, config),
            wire.Evaluated: lambda m: (
                newest_objection(m.result.version, federation.newest) or judged_objection(m.result, most_tokens)
            ),
        }

    def objection(self, message: wire.Up) -> str:
        """The objection to a message of a replica that has joined, or to the Hello of one that joins."""
        check = self._checks.get(type(message))
        if check is None:
            return ""
        return check(message) or round_objection(message, self._federation.history.last_round)

    def to_event(self, replica: int, event: TokenEvent, record: RequestRecord | None) -> str:
        """The objection to tokens or the end of a request. record: None if the replica does not hold it."""
        if record is None:
            return ""
        return event_objection(event, record, self._fleet.hello_of(replica), self._fleet.newest_of(replica))

    def _hello(self, hello: wire.Hello) -> str:
        others = [other for other in self._fleet.hellos if other.replica != hello.replica]
        return (
            newest_objection(hello.version, self._federation.newest)
            or held_objection(hello.versions, self._federation.newest, self._config)
            or size_objection(hello, self._config)
            or (model_objection(hello, others[0]) if others else "")
        )

    def _published(self, message: wire.Published) -> str:
        return publication_objection(message, self._federation.current) or (
            self._flaw(message) if self._federation.awaits(message) else ""
        )

    def _flaw(self, message: wire.Published) -> str:
        adapter, described = self._config.adapter, self._fleet.hello_of(message.replica).adapter
        flaw = config_flaw(message.config_json, adapter.r, adapter.lora_alpha)
        return flaw or weights_flaw(message.weights, described)

    def _settled(self, message: wire.Settled) -> str:
        serves = self._fleet.version_of(message.replica)
        forward = message.version >= serves or self._federation.adapter_of(message.version) != CLIF
        if not forward and message.version not in self._versions.returned_to:
            return f"it settles version {message.version} and served {serves} before"
        return newest_objection(message.version, self._federation.newest)


def newest_objection(version: int, newest: int) -> str:
    return f"version {version} was never given, the newest is {newest}" if version > newest else ""


def held_objection(versions: tuple[int, ...], newest: int, config: Config) -> str:
    """A replica has a slot for each version that it holds."""
    if len(versions) > config.adapter.serving_slots or len(set(versions)) < len(versions):
        return f"it holds {len(versions)} versions in {config.adapter.serving_slots} slots"
    return newest_objection(max(versions, default=0), newest)


def size_objection(hello: wire.Hello, config: Config) -> str:
    """A replica has the configured sizes or smaller ones."""
    sizes = (
        ("max_batch", hello.max_batch, config.engine.max_batch),
        ("kv_tokens", hello.kv_tokens, config.kv_tokens_bound),
        ("max_context", hello.max_context, config.model.max_context),
    )
    too_much = [f"{name} {claimed}, the run has {given}" for name, claimed, given in sizes if claimed > given]
    return f"it says Hello with {'; '.join(too_much)}" if too_much else ""


def model_objection(hello: wire.Hello, other: wire.Hello) -> str:
    """Averaging needs replicas with the same model and the same adapter tensors."""
    if hello.vocabulary != other.vocabulary:
        return f"its model has {hello.vocabulary} token ids, that of replica {other.replica} {other.vocabulary}"
    return "" if hello.adapter == other.adapter else f"its adapters are others than those of replica {other.replica}"


def event_objection(event: TokenEvent, record: RequestRecord, hello: wire.Hello, serves: int) -> str:
    """hello: the Hello of the replica that holds the request. serves: the newest version that it answered with."""
    request, name = record.request, f"request {record.request.id}"
    begins = record.state is RequestState.DISPATCHED
    answered = len(event.tokens) + (0 if begins and event.version != record.version else len(record.tokens))
    if event.tokens:
        if max(event.tokens) >= hello.vocabulary:
            return f"{name}: token id {max(event.tokens)} of {hello.vocabulary}"
        if request.version is not None and event.version != request.version:
            return f"{name}: tokens of version {event.version}, {request.version} was asked for"
        if request.version is None and event.version > serves:
            return f"{name}: tokens of version {event.version}, it serves {serves}"
        if not begins and event.version != record.version:
            return f"{name}: version changed from {record.version} to {event.version} within the answer"
        if answered > request.sampling.max_tokens:
            return f"{name}: {answered} tokens, {request.sampling.max_tokens} were asked for"
    if event.text is not None and not request.sampling.stop:
        return f"{name}: a text of its own, though no stop string was given"
    flaw = logprobs_objection(event, request, hello.vocabulary)
    if flaw:
        return f"{name}: {flaw}"
    # Most events are no ends: each token of each answer passes here.
    if event.finish is None:
        return ""
    impossible = {
        FinishReason.STOP: not answered,
        FinishReason.LENGTH: answered < request.sampling.max_tokens,
        FinishReason.CANCELLED: True,
        FinishReason.REJECTED: request.max_total_tokens <= hello.kv_tokens,
    }
    if impossible.get(event.finish, False):
        return f"{name}: it ends as {event.finish.value} after {answered} tokens, which cannot be"
    return ""


def logprobs_objection(event: TokenEvent, request: Request, vocabulary: int) -> str:
    """The bounds of log-probabilities are those of the message."""
    asked = request.sampling.logprobs
    if event.prompt_logprobs and not request.sampling.prompt_logprobs:
        return f"{len(event.prompt_logprobs)} log-probabilities of the prompt, none were asked for"
    if asked is None:
        return f"{len(event.logprobs)} log-probabilities, none were asked for" if event.logprobs else ""
    if event.prompt_logprobs and tuple(one.token for one in event.prompt_logprobs) != request.prompt[1:]:
        return f"log-probabilities of {len(event.prompt_logprobs)} tokens that are not those of its prompt"
    if tuple(one.token for one in event.logprobs) != event.tokens:
        return f"log-probabilities of {len(event.logprobs)} tokens that are not its {len(event.tokens)}"
    # Fewer than were asked for, if the model has no more tokens.
    reported = (*event.logprobs, *event.prompt_logprobs)
    if any(len(one.top) > asked or any(token >= vocabulary for token, _ in one.top) for one in reported):
        return f"log-probabilities of others than {asked} alternatives of {vocabulary} token ids"
    return ""


def round_objection(message: wire.Up, last_round: int) -> str:
    """last_round: the number of the newest round that began."""
    match message:
        case wire.StepsDone(result):
            claimed = result.round_id
        case wire.Voted(vote):
            claimed = vote.round_id
        case wire.Published() | wire.Settled():
            claimed = message.round_id
        case _:
            return ""
    return f"round {claimed} has never begun" if claimed > last_round else ""


def steps_objection(result: RoundResult, current: Round | None, config: Config) -> str:
    if current is None or result.round_id != current.plan.round_id:
        return ""
    plan, longest = current.plan, min(config.data.max_sample_tokens, config.model.max_context)
    # The last step may exceed what was asked for, at the largest micro-batch that the coordinator allows.
    most = plan.samples + config.train.max_micro_batch * plan.accumulation
    if result.replica not in plan.members:
        return f"it is no member of round {plan.round_id}"
    if result.replica in current.results:
        return f"it reports the steps of round {plan.round_id} twice"
    if result.samples > most or result.steps > result.samples or result.tokens > result.samples * longest:
        return f"{result.steps} steps, {result.samples} samples, {result.tokens} tokens of {plan.samples} samples"
    return f"{result.targets} answer tokens of {result.tokens}" if result.targets > result.tokens else ""


def vote_objection(vote: Vote, current: Round | None, most: int) -> str:
    """most: answer tokens that a member can judge by."""
    if current is None or vote.round_id != current.plan.round_id:
        return ""
    if vote.replica not in current.plan.members:
        return f"it is no member of round {current.plan.round_id}"
    if vote.replica in current.votes:
        return f"it votes twice in round {current.plan.round_id}"
    if current.state is RoundState.TRAINING:
        return f"it votes on round {current.plan.round_id} before anything was averaged"
    sums = (vote.candidate_loss, vote.active_loss, vote.error2 or 0.0, vote.product2 or 0.0)
    if not 0 < vote.outer_step <= 1:
        return f"it judged the average at {vote.outer_step:g} of the way"
    if vote.tokens > most or any(value < 0 for value in sums):
        return f"a vote of {vote.tokens} tokens of {most}, with the sums {', '.join(f'{value:g}' for value in sums)}"
    return ""


def judged_objection(result: HeldoutLoss, most: int) -> str:
    """most: as for a vote."""
    if result.tokens > most or result.loss < 0:
        return f"a held-out loss of {result.loss:g} over {result.tokens} tokens of {most}"
    return ""


def publication_objection(message: wire.Published, current: Round | None) -> str:
    """Only a member that was asked for the weights may publish them, once."""
    if current is None or message.round_id != current.plan.round_id:
        return ""
    if message.replica not in current.asked:
        return f"it publishes version {message.version}, for which it was not asked"
    return newest_objection(message.version, current.version)
