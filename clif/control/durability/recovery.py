"""What a control process continues with, decided from the journal of earlier ones. Pure functions, free of torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import msgspec

from clif.control.durability.journal import (
    Accepted,
    Began,
    Elapsed,
    Ended,
    Entered,
    Line,
    ReplicaDrained,
    RoundBegan,
    RoundStored,
    TrainingPaused,
    VersionGiven,
)
from clif.control.policy.phases import Phase
from clif.data.load import ScheduledRequest
from clif.types import AdapterVersion
from clif.types import first_id as first_id_of


@dataclass
class Past:
    """The sum of the journal. accepted, ended: by request id; a second line for the same id does not count.

    done, opened: whether the last run in this folder went through, and whether its load had begun. rounds: those that
    it committed, if their adapters became current. load_s, run_s: how long its load and the run itself took, seconds.
    paused, drained: what an operator wants of training and of replicas, with the reasons.
    """

    starts: int = 0
    load: str = ""
    first_id: int = 0
    done: bool = True
    opened: bool = False
    load_s: float = 0.0
    run_s: float = 0.0
    last_round: int = 0
    last_version: int = 0
    rounds: set[int] = field(default_factory=set)
    accepted: dict[int, Accepted] = field(default_factory=dict)
    ended: dict[int, Ended] = field(default_factory=dict)
    stored: dict[int, RoundStored] = field(default_factory=dict)
    paused: str = ""
    drained: dict[int, str] = field(default_factory=dict)

    @property
    def next_id(self) -> int:
        """Id after those of the load; clients have other ranges."""
        return max(_of_load((*self.accepted, *self.ended)), default=-1) + 1


def add_up(lines: Iterable[Line]) -> Past:
    """The state that the lines describe."""
    past = Past()
    for line in lines:
        _add(past, line)
    return past


def _add(past: Past, line: Line) -> None:
    match line:
        case Began():
            past.starts += 1
            past.load, past.first_id, past.done = line.load, line.first_id, False
            if not line.continued:
                past.opened, past.load_s, past.run_s, past.rounds = False, 0.0, 0.0, set()
                past.paused, past.drained = "", {}
        case Entered():
            past.opened = past.opened or line.phase == Phase.OPEN.value
            past.done = line.phase == Phase.DONE.value
        case Accepted():
            past.accepted.setdefault(line.request.id, line)
            past.load_s = max(past.load_s, line.at_s)
        case Ended():
            past.ended.setdefault(line.id, line)
        case Elapsed():
            past.load_s, past.run_s = max(past.load_s, line.load_s), line.run_s
        case RoundBegan():
            past.last_round = max(past.last_round, line.round_id)
        case VersionGiven():
            past.last_version = max(past.last_version, line.version)
        case RoundStored():
            past.rounds.add(line.round_id)
            past.stored.setdefault(line.round_id, line)
        case TrainingPaused():
            past.paused = line.reason
        case ReplicaDrained():
            past.drained.pop(line.replica, None)
            past.drained |= {line.replica: line.reason} if line.reason else {}


@dataclass(frozen=True)
class Recorded:
    """What has a row in the tables of earlier processes: user requests by id, rounds and adapter versions by number.

    requests: those that ended; offered: those that the load submitted.
    """

    requests: frozenset[int] = frozenset()
    offered: frozenset[int] = frozenset()
    rounds: frozenset[int] = frozenset()
    versions: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Recovery:
    """What the next start continues with.

    load: what is still to come, with ids that no request of this folder had; fingerprint: what it is made from.
    first_id: id of the load's first request. load_s: how long it came already; run_s: how long the run took already.
    open: accepted requests without an end, to be answered from their first token. unrecorded: requests that ended but
    have no row in any table; rounds, their adapters and loaded ones the same. stored: all rounds whose adapters are
    stored. lost: ids of requests that were submitted, of which the journal does not know: it was damaged or deleted.
    over: nothing is left to do but to stop. paused, drained: as in Past.
    """

    load: tuple[ScheduledRequest, ...] = ()
    fingerprint: str = ""
    first_id: int = 0
    starts: int = 0
    load_s: float = 0.0
    run_s: float = 0.0
    continued: bool = False
    opened: bool = False
    over: bool = False
    last_round: int = 0
    last_version: int = 0
    completed: int = 0
    open: tuple[Accepted, ...] = ()
    lost: frozenset[int] = frozenset()
    unrecorded: tuple[tuple[Accepted, Ended], ...] = ()
    unrecorded_rounds: tuple[RoundStored, ...] = ()
    unrecorded_adapters: tuple[RoundStored, ...] = ()
    unrecorded_loaded: tuple[AdapterVersion, ...] = ()
    stored: Mapping[int, RoundStored] = field(default_factory=dict)
    paused: str = ""
    drained: Mapping[int, str] = field(default_factory=dict)


def fingerprint(load: Sequence[ScheduledRequest]) -> str:
    """Equal for two loads of the same requests at the same times."""
    digest = hashlib.sha256()
    for scheduled in load:
        digest.update(msgspec.msgpack.encode(scheduled))
    return digest.hexdigest()[:16]


def recover(
    past: Past,
    load: Sequence[ScheduledRequest],
    relaunched: bool,
    committed: Set[int],
    recorded: Recorded,
    loaded: Iterable[AdapterVersion] = (),
) -> Recovery:
    """What is left of a run.

    A run that did not go through is continued if its load is still the same: the load goes on where it was, and what
    was offered is not offered again. Otherwise the load begins, with new ids. relaunched: by the launcher and not by a
    person, who may want another run in this folder. committed: rounds whose adapters are stored. loaded: stored
    versions that no round made.
    """
    print_ = fingerprint(load)
    over = past.done and relaunched and past.starts > 0
    continued = past.starts > 0 and (over or (not past.done and past.load == print_))
    first_id = (
        past.first_id if continued else max((past.next_id - 1, *_of_load(recorded.requests | recorded.offered))) + 1
    )
    shifted = [_shift(s, first_id) for s in load]
    stored = [r for r in past.stored.values() if r.round_id in committed]
    known = past.accepted.keys() | past.ended.keys() | recorded.requests
    to_come = () if over else tuple(s for s in shifted if s.request.id not in known)
    return Recovery(
        load=to_come,
        fingerprint=print_,
        first_id=first_id,
        starts=past.starts,
        load_s=past.load_s if continued else 0.0,
        run_s=past.run_s if continued else 0.0,
        continued=continued,
        opened=continued and past.opened,
        over=over,
        last_round=max((past.last_round, *recorded.rounds)),
        last_version=max((past.last_version, *recorded.versions)),
        completed=len(past.rounds & committed) if continued else 0,
        open=tuple(a for i, a in past.accepted.items() if i not in past.ended and i not in recorded.requests),
        lost=recorded.offered - known - {s.request.id for s in to_come},
        unrecorded=tuple(
            (past.accepted[i], e) for i, e in past.ended.items() if i in past.accepted and i not in recorded.requests
        ),
        unrecorded_rounds=tuple(r for r in stored if r.round_id not in recorded.rounds),
        stored={r.round_id: r for r in stored},
        unrecorded_adapters=tuple(r for r in stored if r.version not in recorded.versions),
        unrecorded_loaded=tuple(v for v in loaded if v.number not in recorded.versions),
        paused=past.paused if continued else "",
        drained=past.drained if continued else {},
    )


def _of_load(ids: Iterable[int]) -> list[int]:
    return [i for i in ids if i < first_id_of(1)]


def _shift(scheduled: ScheduledRequest, first_id: int) -> ScheduledRequest:
    if not first_id:
        return scheduled
    request = msgspec.structs.replace(scheduled.request, id=scheduled.request.id + first_id)
    return msgspec.structs.replace(scheduled, request=request)


def hands_over(restarts_left: int, gathering: bool, draining: bool, lost: bool) -> bool:
    """Whether a run that ends early leaves its open requests to the next start instead of ending them.

    Only when torchrun has restarts left. A signal (draining) means that a person wants the run to end, unless a rank is
    lost: then torchrun clears up before it restarts. While replicas gather the two cannot be told apart.
    """
    return restarts_left > 0 and (lost or gathering or not draining)
