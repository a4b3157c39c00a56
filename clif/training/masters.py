"""Float32 masters of the versions that a replica holds: what the shadow of a round begins from.

A serving slot has a version rounded to the type of the base, which is not what training continues with. Masters lie in
the host's memory; those of the base are drawn again instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from clif.adapters.bank import AdapterBank
from clif.adapters.slots import SlotTable
from clif.distributed.collectives import RoundBroken

UNKNOWN = -1
"""In place of the shadow's version: it is something else."""


class Masters:
    """This rank's parts, as vectors [n] that are laid out like the shadow.

    draw: makes the shadow what it was before any training, the same on every replica. shadow: the version that the
    shadow equals between rounds.
    """

    def __init__(self, bank: AdapterBank, slots: SlotTable, draw: Callable[[], None]) -> None:
        self.shadow = 0
        self._bank, self._slots, self._draw = bank, slots, draw
        self._flat: dict[int, torch.Tensor] = {}

    def __contains__(self, version: int) -> bool:
        return version in self._flat

    def __getitem__(self, version: int) -> torch.Tensor:
        return self._flat[version]

    def add(self, version: int, flat: torch.Tensor) -> None:
        """Take the master of a version that is held, in the host's memory; nothing changes it afterwards."""
        self._flat[version] = flat
        self.prune()

    def prune(self) -> None:
        """Forget versions that can no longer be read here."""
        self._flat = {version: flat for version, flat in self._flat.items() if self._slots.holds(version)}

    def begin_from(self, version: int) -> None:
        """Make the shadow this version. Raises RoundBroken, on all ranks of the replica, if it is not held."""
        if version == self.shadow:
            return
        if version and not (version in self._flat and self._slots.holds(version)):
            raise RoundBroken(f"adapter version {version}, which the round begins from, is not held here")
        if version:
            self._bank.load_shadow(self._flat[version])
        else:
            self._draw()
        self.shadow = version
