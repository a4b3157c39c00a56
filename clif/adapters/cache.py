"""Keeps the most recently used adapters of PEFT folders in the serving slots of a bank.

Invariant: the cache is one of the readers of each version that it holds, so that a version stays readable after a
newer one has become active (see slots.SlotTable), and a version with other readers never makes room.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clif.adapters.bank import AdapterBank
from clif.adapters.peft_io import AdapterError, fit_folder
from clif.adapters.slots import SlotTable
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE

Key = tuple[Path, int, int]
"""A folder and the modification times of its two files: a new export is another adapter."""


class AdapterCache:
    """The only user that promotes versions in these slots."""

    def __init__(self, bank: AdapterBank, slots: SlotTable) -> None:
        self._bank, self._slots = bank, slots
        self._versions: dict[Key, int] = {}

    def versions_of(self, folders: Sequence[Path]) -> dict[Path, int]:
        """The version of each folder's adapter, loaded if necessary. Raises AdapterError.

        All of them stay readable until the next call.
        """
        wanted = {folder: _key(folder) for folder in dict.fromkeys(folders)}
        count, slots = len(set(wanted.values())), self._slots.slots
        if count > slots:
            raise AdapterError(
                f"{count} adapters at once, but adapter.serving_slots is {slots}: raise it, or ask for fewer at once"
            )
        for key in wanted.values():
            # Loaded ones become the most recent first, so that only adapters outside of this call make room.
            if key in self._versions:
                self._versions[key] = self._versions.pop(key)
        for folder, key in wanted.items():
            if key not in self._versions:
                self._versions[key] = self._load(folder, set(wanted.values()))
        return {folder: self._versions[key] for folder, key in wanted.items()}

    def _load(self, folder: Path, kept: set[Key]) -> int:
        # Before anything makes room for it.
        state = fit_folder(self._bank, folder)
        slot, version = self._free_slot(kept), self._slots.active + 1
        self._bank.fill_slot(slot, state)
        self._slots.promote(version, slot)
        return self._slots.acquire(version)

    def _free_slot(self, kept: set[Key]) -> int:
        slot = self._slots.free_slot()
        for key, version in [*self._versions.items()]:
            if slot is not None:
                return slot
            # The active version keeps its slot until another one is promoted.
            if key in kept or version == self._slots.active:
                continue
            self._slots.release(version)
            if self._slots.holds(version):
                self._slots.acquire(version)
            else:
                del self._versions[key]
                slot = self._slots.free_slot()
        if slot is None:
            raise AdapterError(
                f"all {self._slots.slots} adapter slots are read by requests that run: wait for them, or raise "
                "adapter.serving_slots"
            )
        return slot


def _key(folder: Path) -> Key:
    try:
        changed = [(folder / name).stat().st_mtime_ns for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except OSError as error:
        raise AdapterError(f"{folder} is not a PEFT adapter folder: {error.strerror} ({error.filename})") from error
    return folder.resolve(), changed[0], changed[1]
