"""Promoted adapters on disk: RUN/adapters/vNNNN (a PEFT folder) and RUN/adapters/current.json, both atomic.

What was committed is one fact in one place: current.json lists it, and with it which version of each adapter is active
and what the operator chose. A folder that it does not name counts for nothing.

Free of torch: the control process writes them, replicas read them when a run is resumed.
"""

from __future__ import annotations

import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from clif.errors import InputError
from clif.storage.disk_space import Room
from clif.storage.files import write_atomic, write_synced
from clif.types import CLIF, AdapterVersion

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CURRENT_FILE = "current.json"

NO_ROUND = 0
"""In place of a round's number: the version was loaded from a folder."""

log = logging.getLogger(__name__)


class AdapterStore:
    """Writes and finds the promoted adapters of a run. room: how long a full disk is waited for."""

    def __init__(self, run_dir: Path, room: Room | None = None) -> None:
        self.folder = run_dir / "adapters"
        self._room = room or Room(self.folder)

    def path(self, version: int) -> Path:
        """The PEFT folder of a version."""
        return self.folder / f"v{version:04d}"

    def write(self, version: AdapterVersion, config_json: str, weights: bytes, active: bool = True) -> Path:
        """Store a version; a crash leaves the old or the new, never a part. active: it becomes that of its adapter.

        The replacement of current.json commits its round, and nothing else does. Writing it again is harmless.
        Raises OSError, InputError as committed() does.
        """
        return self._room.repeat(partial(self._write, version, config_json, weights, active))

    def _write(self, version: AdapterVersion, config_json: str, weights: bytes, active: bool) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.path(version.number)
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_synced(temporary / CONFIG_FILE, config_json.encode())
        write_synced(temporary / WEIGHTS_FILE, weights)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        stored = self.read()
        known = {each.number: each for each in (*stored.committed, version)}
        chosen = {**stored.active, version.adapter: version.number} if active else stored.active
        self._replace(Stored(tuple(known[n] for n in sorted(known)), chosen, stored.pinned, stored.canary))
        return final

    def choose(self, stored: Stored) -> None:
        """Store what the operator chose, beside the versions that are there. Raises OSError, InputError."""
        if self.read().committed:
            self._room.repeat(partial(self._replace, stored))

    def _replace(self, stored: Stored) -> None:
        described = _Current(stored.last, stored.committed, stored.active, stored.pinned, stored.canary)
        write_atomic(self.folder / CURRENT_FILE, msgspec.json.encode(described))

    def sweep(self) -> None:
        """Remove what a process left that died before its version became the current one. For the writer alone."""
        names = {self.path(known.number).name for known in self.committed()}
        for path in (*self.folder.glob("v*"), *self.folder.glob(".v*.tmp")):
            if path.name not in names:
                log.info("%s was never committed: removed", path)
                shutil.rmtree(path)

    def weights(self, version: int) -> bytes:
        """The safetensors file of a version. Raises OSError."""
        return (self.path(version) / WEIGHTS_FILE).read_bytes()

    def config(self, version: int) -> str:
        """The adapter_config.json of a version. Raises OSError."""
        return (self.path(version) / CONFIG_FILE).read_text()

    def read(self) -> Stored:
        """All that current.json says, at one moment. Raises InputError if it is damaged."""
        path = self.folder / CURRENT_FILE
        if not path.exists():
            return Stored()
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_Current)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} is damaged ({error}): it alone says which rounds count. Restore it, or start a new run"
            ) from error
        newest = {version.adapter: version.number for version in found.committed}
        return Stored(found.committed, newest if found.active is None else found.active, found.pinned, found.canary)

    def committed(self) -> tuple[AdapterVersion, ...]:
        """All stored versions in order: the one record of what was committed. Raises InputError as read() does."""
        return self.read().committed

    def rounds(self, last: int | None = None) -> frozenset[int]:
        """Numbers of the rounds that were committed, by default all, else those of the versions up to `last`.

        Raises InputError as committed() does.
        """
        made = (known for known in self.committed() if known.round_id != NO_ROUND)
        return frozenset(known.round_id for known in made if last is None or known.number <= last)

    def loaded(self) -> tuple[AdapterVersion, ...]:
        """Stored versions that no round made. Raises InputError as read() does."""
        return tuple(known for known in self.committed() if known.round_id == NO_ROUND)

    def current(self) -> AdapterVersion | None:
        """The active version of adapter `clif`, or None for the base. Raises InputError as read() does."""
        stored = self.read()
        return stored.version(stored.active.get(CLIF, 0))


class Canary(msgspec.Struct, frozen=True):
    """The operator's choice that a share of the requests to adapter `clif` is answered by this version."""

    version: int
    share: Annotated[float, msgspec.Meta(ge=0, le=1)]


class Stored(msgspec.Struct, frozen=True):
    """committed: stored versions in order of their numbers. active: by adapter, 0 for the base; pinned, canary: the
    operator's choices."""

    committed: tuple[AdapterVersion, ...] = ()
    active: dict[str, int] = {}
    pinned: tuple[int, ...] = ()
    canary: Canary | None = None

    @property
    def last(self) -> int:
        """The highest number; 0 without a version."""
        return self.committed[-1].number if self.committed else 0

    def version(self, number: int) -> AdapterVersion | None:
        """The stored version of this number; None: there is none."""
        return next((known for known in self.committed if known.number == number), None)


class _Current(msgspec.Struct, frozen=True):
    """current.json. version: for readers in a hurry; it is the last one of `committed`.

    active: absent in files of before there were several adapters; the last one is active then.
    """

    version: int
    committed: tuple[AdapterVersion, ...]
    active: dict[str, int] | None = None
    pinned: tuple[int, ...] = ()
    canary: Canary | None = None

    def __post_init__(self) -> None:
        if not self.committed or self.committed[-1].number != self.version:
            raise ValueError("version is not the last committed one")
