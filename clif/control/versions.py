"""The registry of adapter versions: which there are, which are active and kept, and which one a model's name means.

Names: `base` is version 0. `clif` is the active version of adapter `clif`, or the canary for its share of the requests.
`clif@v0007` is version 7 for as long as it is kept. Another adapter, say of a tenant's jobs, has names of its own:
`support`, `support@v0012`.

For the front end, each raising Refused (clif/wire/frontend.py) with a sentence for the client:
  resolve(name, request_id) -> int | None   the version that answers the request; None: the replica's active one
  models() -> rows                          what can be named now, each a ModelRow
  listing() -> rows                         all versions, those that are only stored as well
  canary                                    the operator's choice, or None
What an operator changes is in clif/control/version_actions.py; how replicas follow in clif/control/version_updates.py.
For jobs: active(adapter) is the base of the next round; check_name(name) and check_room(name) refuse a new adapter.

Invariant: what is active, pinned and canary is on disk, in current.json, before any replica is told of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from msgspec.structs import replace

from clif.adapters.store import AdapterStore, Canary, Stored
from clif.config import Config
from clif.control.fleet import Fleet
from clif.control.policy.versions import FOR_READERS, VersionsView, kept_versions, most_needed, needed_versions
from clif.types import CLIF, AdapterVersion
from clif.wire.frontend import Refused

BASE = "base"
LINGER_S = 1.0
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_PINNED = re.compile(r"(?P<adapter>.+)@v(?P<number>\d{1,9})")
_GOLDEN, _WORD = 0x9E3779B97F4A7C15, 2**64


def version_name(version: AdapterVersion | None) -> str:
    """The name that means this version and no other; None: the base."""
    return BASE if version is None else f"{version.adapter}@v{version.number:04d}"


def in_canary(request_id: int, share: float) -> bool:
    """Whether a request is among the share of all: by its id alone, and almost exactly the share of ids in a row.

    Sources: multiplicative hashing by the golden ratio (Knuth, The Art of Computer Programming 3, 6.4).
    """
    return request_id * _GOLDEN % _WORD < share * _WORD


@dataclass(frozen=True)
class ModelRow:
    """A name that a request may use. state: active, kept or stored; the last one cannot be asked for.

    round: that made it, 0: none; created: seconds of the wall clock. everywhere: every serving replica holds it.
    """

    id: str
    version: int
    adapter: str
    state: str
    created: float
    parent: int
    round: int
    heldout_loss: float | None
    job: str
    everywhere: bool


class Versions:
    """kept: what replicas are to keep, with the reason. revision: grows with every change of what is active or kept.

    unix: a stamp of the server's clock as wall time. returned_to: versions that an operator made active, in this start
    or before it.
    """

    def __init__(
        self, config: Config, store: AdapterStore, fleet: Fleet, unix: Callable[[float], float] = lambda now: now
    ) -> None:
        self.store, self.unix = store, unix
        self.kept: tuple[int, ...] = ()
        self.reason = ""
        self.revision = 0
        self.returned_to: set[int] = set()
        self.waiting: Callable[[], Iterable[int]] = lambda: ()
        """Versions that accepted requests wait for, of which no replica knows yet."""
        self._linger = False
        self._probed = 0
        self._next_s = 0.0
        self._config, self._fleet = config, fleet
        self._stored = Stored()
        self._known: Mapping[int, AdapterVersion] = {}
        self._unreadable: set[int] = set()

    def resume(self) -> None:
        """Continue with what is on disk. Raises InputError if it is damaged."""
        self._take(self.store.read())
        self.returned_to.add(self.active())

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def last(self) -> int:
        """The highest stored number."""
        return self._stored.last

    @property
    def canary(self) -> Canary | None:
        return self._stored.canary

    @property
    def pinned(self) -> tuple[int, ...]:
        return self._stored.pinned

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters that have an active version."""
        return tuple(self._stored.active)

    @property
    def all_active(self) -> dict[str, int]:
        """The active version of each adapter that has one, or was rolled back to 0."""
        return dict(self._stored.active)

    def active(self, adapter: str = CLIF) -> int:
        """The active version of an adapter; 0: the base."""
        return self._stored.active.get(adapter, 0)

    @property
    def keeps_newest(self) -> bool:
        """Whether there are slots for versions that need not be kept."""
        return most_needed(self._config) > FOR_READERS + 1

    def get(self, number: int) -> AdapterVersion | None:
        """A stored version; None: there is none, or it is the base."""
        return self._known.get(number)

    def first_of(self, adapter: str) -> AdapterVersion | None:
        """The oldest stored version of an adapter."""
        return next((version for version in self._stored.committed if version.adapter == adapter), None)

    def knows(self, number: int) -> bool:
        """Whether this is the base or a stored version."""
        return number == 0 or number in self._known

    # --- changes -----------------------------------------------------------------------------------------------------

    def add(self, version: AdapterVersion, config_json: str, weights: bytes, active: bool = True) -> None:
        """Store a version. active: it becomes that of its adapter. Raises OSError."""
        self.store.write(version, config_json, weights, active)
        self._take(self.store.read())

    def choose(self, **chosen: Any) -> None:
        """Store what the operator chose: fields of Stored. Raises OSError."""
        stored = replace(self._stored, **chosen)
        self.store.choose(stored)
        self._take(stored)
        self.returned_to |= set(chosen.get("active", {}).values())

    def mark_unreadable(self, number: int) -> None:
        """The files of a version cannot be read: it is not kept in this start."""
        self._unreadable.add(number)
        self._take(self._stored)

    def view(self, **chosen: Any) -> VersionsView:
        """What is to be kept, if the operator chose so."""
        stored = replace(self._stored, **chosen)
        # The adapter that answers by default comes first.
        active = (stored.active.get(CLIF, 0), *stored.active.values())
        numbers = tuple(v.number for v in stored.committed if v.number not in self._unreadable)
        canary = stored.canary.version if stored.canary else 0
        return VersionsView(numbers, active, stored.pinned, canary, probed=self._probed)

    def check_fits(self, **chosen: Any) -> None:
        """Raises Refused if the replicas have too few slots for what the operator would choose."""
        needed, most = len(needed_versions(self.view(**chosen))), most_needed(self._config)
        if needed > most:
            slots = self._config.adapter.serving_slots
            raise Refused(
                "conflict",
                f"that makes {needed} versions to keep, and {slots} slots keep {most}: unpin one, retire an adapter, "
                "or raise adapter.serving_slots",
            )

    def check_name(self, adapter: str) -> None:
        """Raises Refused for what cannot be the name of an adapter."""
        if not _NAME.fullmatch(adapter) or adapter == BASE:
            raise Refused(
                "invalid",
                f"{adapter[:80]!r} cannot name an adapter: use up to 63 of a-z, 0-9, '.', '_' and '-', and not 'base'",
            )

    def check_room(self, *adapters: str) -> None:
        """Raises Refused if there are no slots for the first versions of all these adapters."""
        new = [adapter for adapter in dict.fromkeys(adapters) if not self.active(adapter)]
        given = [
            AdapterVersion(number=self.last + i, round_id=0, heldout_loss=None, adapter=adapter)
            for i, adapter in enumerate(new, 1)
        ]
        if given:
            active = {**self._stored.active, **{version.adapter: version.number for version in given}}
            self.check_fits(committed=(*self._stored.committed, *given), active=active)

    # --- names -------------------------------------------------------------------------------------------------------

    def resolve(self, name: str, request_id: int) -> int | None:
        """The version that answers a request; None: the active one of adapter `clif`, at the replica's own step.

        Raises Refused for a name that means nothing, or a version that is not kept.
        """
        if name == BASE:
            return 0
        if name == CLIF:
            return self._canary_for(request_id)
        if self._stored.active.get(name) == 0:
            # It was rolled back to the base.
            return 0
        found = _PINNED.fullmatch(name)
        number = int(found["number"]) if found else self.active(name)
        version = self.get(number)
        if version is None or (found and found["adapter"] != version.adapter):
            raise Refused("not_found", f"there is no model {name[:80]}: GET /v1/models lists them", "model")
        if number not in self.kept:
            raise Refused("not_found", f"{name} is not kept any more: GET /v1/models lists what is", "model")
        if not self._fleet.held_by_any(number):
            raise Refused("not_ready", f"{name} is being loaded: ask again", "model")
        return number

    def _canary_for(self, request_id: int) -> int | None:
        canary = self.canary
        if canary is None or not in_canary(request_id, canary.share):
            return None
        return canary.version if canary.version in self._fleet.held_by_all else None

    def models(self) -> list[ModelRow]:
        """The base, each adapter, and each version that is kept."""
        names = [self._row(name, self.active(name)) for name in dict.fromkeys((CLIF, *self.adapters))]
        kept = [self._row(version_name(self.get(number)), number) for number in reversed(self.kept)]
        return [self._row(BASE, 0), *names, *kept]

    def listing(self, most: int | None = None) -> list[ModelRow]:
        """All versions, or so many, newest first."""
        newest = islice(reversed(self._stored.committed), most)
        return [self._row(version_name(version), version.number) for version in newest]

    def earlier(self, adapter: str, most: int) -> list[int]:
        """The newest versions of an adapter besides the active one, oldest first, so many at most."""
        numbers = [version.number for version in self._stored.committed if version.adapter == adapter]
        others = [number for number in numbers if number != self.active(adapter) and number not in self._unreadable]
        return others[-most:] if most else []

    def probe(self, number: int) -> None:
        """Keep a version while it is measured, as if it had to be; 0: none any longer. No round may follow."""
        self._probed = number
        self._keep(0.0)
        self.revision += 1

    def row(self, number: int) -> ModelRow:
        """A version as it is listed."""
        return self._row(version_name(self.get(number)), number)

    def _row(self, name: str, number: int) -> ModelRow:
        version = self.get(number)
        active = number == self.active(version.adapter if version else CLIF)
        return ModelRow(
            id=name,
            version=number,
            adapter=version.adapter if version else "",
            state="active" if active else "kept" if number in (0, *self.kept) else "stored",
            created=version.created_unix if version else 0.0,
            parent=version.parent if version else 0,
            round=version.round_id if version else 0,
            heldout_loss=version.heldout_loss if version else None,
            job=version.job if version else "",
            everywhere=number == 0 or number in self._fleet.held_by_all,
        )

    def _take(self, stored: Stored) -> None:
        self._stored = stored
        self._known = {version.number: version for version in stored.committed}
        self._keep(0.0)
        self.revision += 1

    def step(self, now: float) -> None:
        """Give up what was kept for requests alone that wait no longer; looked at once a second."""
        if self._linger and now >= self._next_s:
            self._next_s = now + LINGER_S
            before = self.kept
            self._keep(now)
            self.revision += self.kept != before

    def _keep(self, now: float) -> None:
        view = self.view()
        needed, _ = kept_versions(now, view, self._config)
        waiting = tuple(set(self.waiting()) - set(needed))
        self.kept, self.reason = kept_versions(now, dataclasses.replace(view, waiting=waiting), self._config)
        self._linger = bool(waiting)
        self._fleet.expect(self.kept)
