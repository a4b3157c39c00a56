"""The rounds of a run, one at a time: start, messages, storing and installing what they promote."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Protocol

from clif.config import Config
from clif.control.dispatcher import Dispatcher
from clif.control.fleet import Fleet
from clif.control.policy.replica_state import state_after_round
from clif.control.policy.round_admission import OWN_DATA, History, JobTerms, given_up
from clif.control.round_groups import GroupNumbers
from clif.control.rounds import Outgoing, Round
from clif.control.versions import Versions
from clif.states import ReplicaState, RoundState
from clif.types import CLIF, AdapterVersion, RoundPlan
from clif.wire.messages import Install, Published, RoundFailed, Settled, StepsDone, Voted

log = logging.getLogger(__name__)


class RoundObserver(Protocol):
    """Called as rounds go on, each time before anything follows from it."""

    def on_round_began(self, plan: RoundPlan) -> None: ...

    def on_round_decided(self, current: Round) -> None:
        """Its members are about to promote a version, or to drop the candidate."""
        ...

    def on_storing(self, current: Round, version: AdapterVersion) -> None:
        """The promoted adapter is about to be written to disk."""
        ...

    def on_stored(self, version: AdapterVersion) -> None:
        """The promoted adapter is on disk."""
        ...

    def on_round_ended(self, ended: Round) -> None:
        """Once per round, when nothing of it is awaited any more."""
        ...


class RoundObservers:
    """Several observers as one, called in their order."""

    def __init__(self, *observers: RoundObserver) -> None:
        self._observers = observers

    def on_round_began(self, plan: RoundPlan) -> None:
        for observer in self._observers:
            observer.on_round_began(plan)

    def on_round_decided(self, current: Round) -> None:
        for observer in self._observers:
            observer.on_round_decided(current)

    def on_storing(self, current: Round, version: AdapterVersion) -> None:
        for observer in self._observers:
            observer.on_storing(current, version)

    def on_stored(self, version: AdapterVersion) -> None:
        for observer in self._observers:
            observer.on_stored(version)

    def on_round_ended(self, ended: Round) -> None:
        for observer in self._observers:
            observer.on_round_ended(ended)


class Federation:
    """Owner of the round under way and of the history of rounds, by job."""

    def __init__(
        self, config: Config, fleet: Fleet, dispatcher: Dispatcher, versions: Versions, observer: RoundObserver
    ) -> None:
        self.current: Round | None = None
        self._noise_scales: dict[str, float] = {}
        self._job = OWN_DATA.job
        self._config = config
        self._fleet, self._dispatcher, self._versions, self._observer = fleet, dispatcher, versions, observer
        self._last_version = self._last_round = self._reserved = 0
        self._histories: dict[str, History] = {}
        self._groups = GroupNumbers(fleet.expected)
        self._installing: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        """Whether a round is under way, or a replica has yet to install the last promotion."""
        return self.current is not None or bool(self._installing)

    @property
    def newest(self) -> int:
        """The newest version that any replica may serve: the last that a round was decided for."""
        return max(self._last_version, self.current.version if self.current is not None else 0)

    @property
    def history(self) -> History:
        """The rounds of the run's own data."""
        return self.history_of(OWN_DATA)

    def history_of(self, terms: JobTerms) -> History:
        """The rounds of a job."""
        known = self._histories.get(terms.job, History())
        return replace(known, last_round=self._last_round, version=self._versions.active(terms.adapter))

    def continue_job(self, job: str, history: History) -> None:
        """Begin with what earlier starts did for a job."""
        self._histories[job] = history

    @property
    def noise_scale(self) -> float | None:
        """Of the gradients of the job that trains, or has trained last."""
        return self._noise_scales.get(self._job)

    def awaits(self, message: Published) -> bool:
        """Whether these weights are to be stored."""
        return self.current is not None and self.current.awaits(message)

    def resume(self, last_round: int = 0, last_version: int = 0, completed: int = 0) -> None:
        """Continue after the last promoted version on disk, if there is one.

        last_round, last_version: the highest numbers that were given out; numbers are never reused. completed: rounds.
        """
        self._versions.resume()
        self._histories[OWN_DATA.job] = History(completed=completed)
        found = self._versions.get(self._versions.last)
        self._last_version = max(last_version, self._versions.last)
        self._last_round = max(last_round, found.round_id if found else 0)

    def start(self, now: float, plan: RoundPlan, reason: str) -> None:
        """Begin a planned round: members become COMBINED first and get the plan afterwards."""
        if self.current is not None:
            raise RuntimeError(f"round {self.current.plan.round_id} is still under way")
        self._observer.on_round_began(plan)
        group = self._groups.of(plan.member_set, plan.round_id)
        self._reserved = self._last_version + 1
        self.current = Round(plan, self._reserved, now, self._config.federation, group)
        self._last_round, self._job = plan.round_id, plan.job
        for member in plan.members:
            self._fleet.set_state(now, member, ReplicaState.COMBINED, f"round {plan.round_id}: {reason}")
        self._send_all(self.current.begin())

    def on_steps(self, now: float, message: StepsDone) -> None:
        if self.current is not None:
            self._step(now, self.current.steps_done(now, message.result))

    def on_vote(self, now: float, message: Voted) -> None:
        if self.current is None:
            return
        messages = self.current.voted(now, message.vote)
        if self.current.decided:
            self.current.running_requests = self._dispatcher.running
            self._observer.on_round_decided(self.current)
        self._step(now, messages)

    def on_failure(self, now: float, message: RoundFailed) -> None:
        if self.current is not None and message.round_id == self.current.plan.round_id:
            self._step(now, self.current.failed(now, message.replica, message.error))

    def on_settled(self, now: float, message: Settled) -> None:
        """A member, or a replica that installed a version or was told to go back to one, serves it now."""
        if self.adapter_of(message.version) == CLIF:
            self._fleet.installed(message.replica, message.version)
        if message.version >= self._installing.get(message.replica, math.inf):
            del self._installing[message.replica]
        if self.current is not None and message.round_id == self.current.plan.round_id:
            self.current.settled(now, message.replica)
            self._step(now, [])

    def on_published(self, now: float, message: Published) -> None:
        """Store the promoted adapter first, and then send it to the replicas that were not in the round."""
        current = self.current
        if current is None or not current.publication(now, message):
            log.debug("version %d was published again: ignored", message.version)
            return
        loss = current.promotion.candidate_loss if current.promotion else None
        version = AdapterVersion(
            number=message.version,
            round_id=message.round_id,
            heldout_loss=loss,
            adapter=current.plan.adapter,
            parent=current.plan.base_version,
            job=current.plan.job,
            created_unix=self._versions.unix(now),
        )
        self._observer.on_storing(current, version)
        self._versions.add(version, message.config_json, message.weights)
        self._last_version = max(self._last_version, version.number)
        self._observer.on_stored(version)
        # A member that failed and came back is no longer a member. Versions of other adapters come with what is kept.
        for replica in sorted(set(self._fleet.alive) - set(current.members)) if version.adapter == CLIF else ():
            self.install(replica, version, message.weights)
        self._step(now, [])

    def take_number(self) -> int:
        """A number for a version that no round makes; it is that of no other version, nor of the round under way."""
        self._last_version = max(self._last_version, self._reserved) + 1
        return self._last_version

    def adapter_of(self, version: int) -> str:
        """The adapter that a version belongs to; one that is not known is the default adapter's."""
        if self.current is not None and version == self.current.version and not self._versions.knows(version):
            return self.current.plan.adapter
        known = self._versions.get(version)
        return CLIF if known is None else known.adapter

    def installing(self, replica: int) -> int | None:
        """The version that the replica has been sent to be its active one, and does not serve yet."""
        return self._installing.get(replica)

    def install(self, replica: int, version: AdapterVersion, weights: bytes) -> None:
        """Send a version of adapter `clif` that becomes the replica's active one."""
        self._installing[replica] = version.number
        self._fleet.send(replica, Install(version=version.number, weights=weights, round_id=version.round_id))

    def on_lost(self, now: float, replica: int, why: str) -> None:
        self._installing.pop(replica, None)
        if self.current is not None:
            self._step(now, self.current.lost(now, replica, why))

    def advance(self, now: float) -> None:
        if self.current is not None:
            self._step(now, self.current.advance(now))

    def drain(self, now: float, reason: str) -> None:
        """Discard the round under way if its members still train. A round past training is about to end by itself."""
        if self.current is not None and self.current.state is RoundState.TRAINING:
            self.abandon(now, reason)

    def wind_up(self, now: float, late_s: float) -> None:
        """When the time for rounds is over, average and judge what the round under way has trained.

        late_s: seconds since then; negative while time is left. A round that takes too long for that is discarded.
        """
        if self.current is None or late_s < 0:
            return
        self._step(now, self.current.wind_up(now))
        if late_s >= self._config.federation.settle_timeout_s:
            self.abandon(now, f"run.linger_s {self._config.run.linger_s:g} is over")

    def abandon(self, now: float, reason: str) -> None:
        """Discard the round under way unless it is decided already."""
        if self.current is not None:
            self._step(now, self.current.discard(now, reason))

    def finish(self, now: float, reason: str) -> None:
        """Close the round under way without awaiting its members: the run is over."""
        if self.current is not None:
            self._step(now, self.current.finish(now, reason))

    def _step(self, now: float, messages: Outgoing) -> None:
        self._send_all(messages)
        current = self.current
        if current is not None and current.over:
            self.current = None
            self._close(now, current)

    def _close(self, now: float, ended: Round) -> None:
        committed = ended.state is RoundState.COMMITTED
        if not ended.left_group_clean:
            self._groups.spoil(ended.plan.member_set)
        # A version number is never reused for other weights, even if no member could publish these.
        self._last_version = max(self._last_version, ended.version)
        job = ended.plan.job
        before, judged = self._histories.get(job, History()), ended.voted_s is not None
        ended.history = before.after(now, committed, judged, ended.outer_step)
        self._histories[job] = ended.history
        if job == OWN_DATA.job:
            ended.gave_up = given_up(ended.history, self._config)
        if ended.gave_up:
            log.warning("training is given up: %s, the last because: %s", ended.gave_up, ended.reason)
        scales = [r.noise_scale for r in ended.results.values() if r.noise_scale is not None]
        if scales:
            self._noise_scales[job] = sum(scales) / len(scales)
        self._observer.on_round_ended(ended)
        for member in ended.members:
            view = self._fleet.view_of(member)
            self._fleet.set_limits(member)
            self._fleet.set_state(
                now, member, state_after_round(view, self._config), f"round {ended.plan.round_id} is over"
            )

    def _send_all(self, messages: Outgoing) -> None:
        for replica, message in messages:
            self._fleet.send(replica, message)
