"""Which adapter version is in which serving slot, and how many still read it. Free of torch.

Invariants: exactly one version is active; a slot is free only when it holds no version; a version that is active, kept
or read is never overwritten; readers keep the version they started on (promise 2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

BASE_SLOT: int | None = None
"""Slot of version 0, the base model: its rows take no adapter at all."""


@dataclass
class _Version:
    slot: int | None
    readers: int = 0


@dataclass
class SlotTable:
    """slots: number of serving slots. The table starts with version 0, the base, active.

    active: what requests read that ask for no version. wanted: versions that are to be kept besides; one that is wanted
    may have yet to come.
    """

    slots: int
    active: int = 0
    wanted: frozenset[int] = frozenset()
    _versions: dict[int, _Version] = field(default_factory=lambda: {0: _Version(BASE_SLOT)})

    def holds(self, version: int) -> bool:
        """Whether a version can be read here: the base always, the others while they are active, kept or retiring."""
        return version == 0 or version in self._versions

    @property
    def held(self) -> tuple[int, ...]:
        """Versions that stay until an order says otherwise, besides the base: the active one and the kept ones."""
        return tuple(sorted(v for v in self._versions if v and self._stays(v)))

    def acquire(self, version: int | None = None) -> int:
        """A new reader of a version that is held, by default of the active one; returns the version."""
        chosen = self.active if version is None else version
        if chosen == 0:
            self._versions.setdefault(0, _Version(BASE_SLOT))
        self._versions[chosen].readers += 1
        return chosen

    def release(self, version: int) -> None:
        """A reader is done. A retiring version without readers gives its slot back."""
        entry = self._versions[version]
        if entry.readers == 0:
            raise RuntimeError(f"adapter version {version} has no reader to release")
        entry.readers -= 1
        self._collect(version)

    def slot_of(self, version: int) -> int | None:
        """Slot of a version that is held or retiring; None is the base."""
        return self._versions[version].slot

    def free_slot(self) -> int | None:
        """A slot without a version, or None: then the promotion waits, and requests do not."""
        used = {entry.slot for entry in self._versions.values()}
        return next((slot for slot in range(self.slots) if slot not in used), None)

    def promote(self, version: int, slot: int) -> None:
        """Make `version`, whose weights are in the free `slot`, active; the former one retires unless it is kept."""
        self.load(version, slot)
        self.activate(version)

    def load(self, version: int, slot: int) -> None:
        """Hold `version`, whose weights are in the free `slot`, if it is wanted; otherwise activate() or keep() follows
        at once. The active one stays."""
        if version in self._versions:
            raise RuntimeError(f"adapter version {version} is held already")
        if slot in {entry.slot for entry in self._versions.values()}:
            raise RuntimeError(f"slot {slot} is still read: it cannot take version {version}")
        self._versions[version] = _Version(slot)

    def activate(self, version: int) -> None:
        """Make a version that can be read here active, the base included; the former one retires unless it is kept."""
        if version == 0:
            self._versions.setdefault(0, _Version(BASE_SLOT))
        if version not in self._versions:
            raise RuntimeError(f"adapter version {version} is not held: it cannot become active")
        former, self.active = self.active, version
        self._collect(former)

    def keep(self, versions: Iterable[int]) -> None:
        """Keep exactly these besides the active one; the others retire."""
        self.wanted = frozenset(versions)
        for version in [*self._versions]:
            self._collect(version)

    @property
    def retiring(self) -> tuple[int, ...]:
        """Versions that are neither active nor kept but still read."""
        return tuple(v for v in self._versions if not self._stays(v))

    def _stays(self, version: int) -> bool:
        return version == self.active or version in self.wanted

    def _collect(self, version: int) -> None:
        if not self._stays(version) and self._versions[version].readers == 0:
            del self._versions[version]
