"""Which adapter versions the replicas keep, besides those that requests still read."""

from __future__ import annotations

from dataclasses import dataclass

from clif.config import Config

FOR_PROMOTION = 1
"""Slots that nothing keeps: a promotion always finds one, once no request reads what was there."""
FOR_READERS = 1
"""Slots that old versions are not kept in by themselves: those that are given up may be read for a while."""


@dataclass(frozen=True)
class VersionsView:
    """stored: numbers of all versions that can be kept, in order. active: of each adapter; pinned, canary: the
    operator's; 0 is the base, which needs no slot. waiting: those that accepted requests wait for. probed: one that is
    being measured after the last round, when no promotion needs a slot; 0: none."""

    stored: tuple[int, ...] = ()
    active: tuple[int, ...] = ()
    pinned: tuple[int, ...] = ()
    canary: int = 0
    waiting: tuple[int, ...] = ()
    probed: int = 0


def needed_versions(view: VersionsView) -> tuple[int, ...]:
    """Versions that must be kept, the most important first."""
    return tuple(v for v in dict.fromkeys((*view.active, view.canary, *view.pinned)) if v in view.stored)


def most_needed(config: Config) -> int:
    """How many versions can be kept because they must be."""
    return config.adapter.serving_slots - FOR_PROMOTION


def kept_versions(now: float, view: VersionsView, config: Config) -> tuple[tuple[int, ...], str]:
    """The versions to keep, in order, with the reason: active ones, the canary, pinned ones, those that requests wait
    for, then the newest that fit.

    A slot is left for the next promotion, and where it is up to us another one for versions that are still read.
    """
    most, slots = most_needed(config), config.adapter.serving_slots
    needed = needed_versions(view)[:most]
    if view.probed in view.stored and view.probed not in needed:
        needed, most = (*needed, view.probed), max(most, len(needed) + 1)
    waiting = [v for v in dict.fromkeys(view.waiting) if v in view.stored and v not in needed][: most - len(needed)]
    free = max(0, most - FOR_READERS - len(needed) - len(waiting))
    newest = [v for v in reversed(view.stored) if v not in (*needed, *waiting)][:free]
    waited = f"{len(waiting)} that requests wait for, " if waiting else ""
    reason = f"{len(needed)} active, canary or pinned, {waited}the newest {len(newest)} besides, of {slots} slots"
    return tuple(sorted((*needed, *waiting, *newest))), reason
