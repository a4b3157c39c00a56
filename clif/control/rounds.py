"""One federated round: local steps -> aggregate -> vote -> commit or discard. Driven by messages and time.

Every method takes the time and returns the messages to send, so that a round runs the same live and in tests.

Sources: federated averaging of local steps, weighted by samples: McMahan et al. 2017 (FedAvg). Rounds that a
coordinator cuts off and abandons by time limits: Bonawitz et al. 2019, "Towards Federated Learning at Scale".
"""

from __future__ import annotations

from clif.config import FederationConfig
from clif.control.policy.promotion import Promotion, decide_promotion
from clif.control.policy.round_admission import History
from clif.states import RoundState, advance
from clif.types import RoundPlan, RoundResult, Vote
from clif.wire.messages import Aggregate, BeginRound, Down, FinishSteps, Published, Settle

Outgoing = list[tuple[int, Down]]


class Round:
    """A round under way. It is over when its state is COMMITTED or DISCARDED and no Settled is awaited.

    Stamps (_s) are seconds of the caller's clock. The owner sets running_requests at the decision, and at the end the
    history with this round, and gave_up to the reason why no further round is tried.

    A decided commit stands: members that fail afterwards change only which member publishes.
    """

    def __init__(
        self, plan: RoundPlan, next_version: int, now: float, config: FederationConfig, group: int = 0
    ) -> None:
        """group: number of the members' process group."""
        self.plan, self.group = plan, group
        self.state = RoundState.TRAINING
        self.reason = ""
        self.began_s = now
        self.trained_s: float | None = None
        self.voted_s: float | None = None
        self.over_s: float | None = None
        self.running_requests = 0
        self.gave_up = ""
        self.history: History | None = None
        self.results: dict[int, RoundResult] = {}
        self.votes: dict[int, Vote] = {}
        self.promotion: Promotion | None = None
        self.version = plan.base_version
        self.published = False
        self._config = config
        self._next_version = next_version
        self._members = set(plan.members)
        self._awaited: set[int] = set()
        self._publisher: int | None = None
        self._asked: set[int] = set()
        self._due_s = now + config.round_timeout_s
        self._asked_to_finish = self._averaging_began = False

    @property
    def decided(self) -> bool:
        return self.state in (RoundState.SETTLING, RoundState.COMMITTED, RoundState.DISCARDED)

    @property
    def outer_step(self) -> float:
        """How far what is promoted lies from the base version to the average, as a share of the way."""
        return self.promotion.outer_step if self.promotion is not None else 1.0

    @property
    def promotes(self) -> bool:
        """Whether its version is decided and becomes active, or is about to."""
        return self.state is RoundState.SETTLING

    @property
    def over(self) -> bool:
        return self.state in (RoundState.COMMITTED, RoundState.DISCARDED) and not self._awaited

    @property
    def members(self) -> tuple[int, ...]:
        """Members that have not failed."""
        return tuple(sorted(self._members))

    @property
    def asked(self) -> frozenset[int]:
        """Members that were asked to publish and have not done so yet."""
        return frozenset(self._asked)

    @property
    def left_group_clean(self) -> bool:
        """Whether no operation can be pending in the members' group: no all-reduce began, or every one ended."""
        return not self._averaging_began or set(self.votes) == set(self.plan.members)

    def begin(self) -> Outgoing:
        return [(m, BeginRound(plan=self.plan, group=self.group)) for m in self.members]

    def steps_done(self, now: float, result: RoundResult) -> Outgoing:
        """A member's local steps are done; after the last member's the members average."""
        if self.state is not RoundState.TRAINING or not self._is_member(result.replica, result.round_id):
            return []
        self.results[result.replica] = result
        if set(self.results) != self._members:
            return []
        self.trained_s = now
        if not any(r.finite and r.samples > 0 for r in self.results.values()):
            return self.discard(now, "no member has a finite result from any sample")
        self.state = advance(self.state, RoundState.AGGREGATING)
        self._averaging_began = True
        self._due_s = now + self._config.settle_timeout_s
        return [(m, Aggregate(round_id=self.plan.round_id)) for m in self.members]

    def voted(self, now: float, vote: Vote) -> Outgoing:
        """A member judged the average; after the last vote the round is decided."""
        if self.state is not RoundState.AGGREGATING or not self._is_member(vote.replica, vote.round_id):
            return []
        self.votes[vote.replica] = vote
        if set(self.votes) != self._members:
            return []
        self.voted_s = now
        self.promotion, reason = decide_promotion([self.votes[m] for m in self.members], self._config)
        if self.promotion is None:
            return self.discard(now, reason)
        return self._commit(now, reason)

    def settled(self, now: float, replica: int) -> None:
        """A member serves what the round decided."""
        self._awaited.discard(replica)
        self._maybe_over(now)

    def awaits(self, message: Published) -> bool:
        """Whether these are the promoted weights, and the first to arrive."""
        awaited = self.state is RoundState.SETTLING and not self.published
        return awaited and message.replica in self._asked and self._is_promoted(message)

    def publication(self, now: float, message: Published) -> bool:
        """Take published weights. True: they are the promoted ones, to be stored and installed."""
        awaited = self.awaits(message)
        if self._is_promoted(message):
            self._asked.discard(message.replica)
        if not awaited:
            return False
        self.published = True
        self._maybe_over(now)
        return True

    def failed(self, now: float, replica: int, error: str) -> Outgoing:
        """A member cannot continue the round; it stays and serves."""
        if self.decided or replica not in self._members:
            return []
        return self.discard(now, f"replica {replica} failed in the round: {error}")

    def lost(self, now: float, replica: int, why: str) -> Outgoing:
        """A member failed. Before the decision that ends the round; after it another member publishes."""
        if replica not in self._members:
            return []
        self._members.discard(replica)
        self._awaited.discard(replica)
        if not self.decided:
            return self.discard(now, f"replica {replica} was lost: {why}")
        sent = self._replace_publisher(now, f"replica {replica} was lost") if replica == self._publisher else []
        self._maybe_over(now)
        return sent

    def advance(self, now: float) -> Outgoing:
        """Apply the time limits: cut off slow local steps, give up on missing results, votes or answers."""
        if self.over or now < self._due_s:
            return []
        if self.state is RoundState.TRAINING and not self._asked_to_finish:
            return self.wind_up(now)
        if self.state is RoundState.TRAINING:
            missing = [m for m in self.members if m not in self.results]
            return self.discard(now, f"no result from replicas {missing} after their time was up")
        if self.state is RoundState.AGGREGATING:
            missing = [m for m in self.members if m not in self.votes]
            return self.discard(now, f"no vote from replicas {missing} in {self._config.settle_timeout_s:g} s")
        if self.state is RoundState.SETTLING and not self.published:
            return self._replace_publisher(now, f"replica {self._publisher} did not publish")
        # A member that has not settled by now will settle later or fail: the decision does not wait for it.
        self.reason += f"; replicas {sorted(self._awaited)} have not settled yet"
        self._awaited.clear()
        self._maybe_over(now)
        return []

    def wind_up(self, now: float) -> Outgoing:
        """Cut local steps off, once: members that still train report what they have done."""
        if self.state is not RoundState.TRAINING or self._asked_to_finish:
            return []
        self._asked_to_finish = True
        self._due_s = now + self._config.settle_timeout_s
        slow = [m for m in self.members if m not in self.results]
        return [(m, FinishSteps(round_id=self.plan.round_id)) for m in slow]

    def discard(self, now: float, reason: str) -> Outgoing:
        """End the round without a promotion: the members drop the candidate and keep the base version.

        Does nothing if the round is decided.
        """
        if self.decided:
            return []
        self.reason = reason
        self.state = advance(self.state, RoundState.DISCARDED)
        self._awaited = set(self._members)
        self._due_s = now + self._config.settle_timeout_s
        settle = Settle(round_id=self.plan.round_id, commit=False, version=self.plan.base_version)
        self._maybe_over(now)
        return [(m, settle) for m in self.members]

    def finish(self, now: float, reason: str) -> Outgoing:
        """End at once, without waiting for answers. Promoted weights that are not stored are given up."""
        messages = self.discard(now, reason)
        if self.state is RoundState.SETTLING and not self.published:
            self.reason += f"; not published: {reason}"
            self.state = advance(self.state, RoundState.DISCARDED)
        self._awaited.clear()
        self._maybe_over(now)
        return messages

    def _commit(self, now: float, reason: str) -> Outgoing:
        self.reason = reason
        self.state = advance(self.state, RoundState.SETTLING)
        self.version = self._next_version
        self._awaited = set(self._members)
        self._publisher = self.members[0]
        self._asked.add(self._publisher)
        self._due_s = now + self._config.settle_timeout_s
        return [(m, self._settle(m == self._publisher)) for m in self.members]

    def _settle(self, publish: bool) -> Settle:
        return Settle(round_id=self.plan.round_id, commit=True, version=self.version, publish=publish)

    def _replace_publisher(self, now: float, why: str) -> Outgoing:
        """Ask the next member for the weights: every member holds the same average."""
        if self.published:
            return []
        later = [m for m in self.members if self._publisher is None or m > self._publisher]
        if not later:
            self.reason = f"{why}, and nobody else can publish version {self.version}"
            self.state = advance(self.state, RoundState.DISCARDED)
            self._maybe_over(now)
            return []
        self._publisher = later[0]
        self._asked.add(self._publisher)
        self._due_s = now + self._config.settle_timeout_s
        return [(self._publisher, self._settle(publish=True))]

    def _maybe_over(self, now: float) -> None:
        if self.state is RoundState.SETTLING and self.published and not self._awaited:
            self.state = advance(self.state, RoundState.COMMITTED)
        if self.over and self.over_s is None:
            self.over_s = now

    def _is_promoted(self, message: Published) -> bool:
        return (message.round_id, message.version) == (self.plan.round_id, self.version)

    def _is_member(self, replica: int, round_id: int) -> bool:
        return replica in self._members and round_id == self.plan.round_id
