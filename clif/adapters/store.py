"""Promoted adapters on disk: RUN/adapters/vNNNN (a PEFT folder) and RUN/adapters/current.json, both atomic.

What was committed is one fact in one place: current.json lists it. A folder that it does not name counts for nothing.

Free of torch: the control process writes them, replicas read them when a run is resumed.
"""

from __future__ import annotations

import logging
import os
import shutil
from functools import partial
from pathlib import Path

import msgspec

from clif.errors import InputError
from clif.storage.disk_space import Room
from clif.storage.files import write_atomic, write_synced
from clif.types import AdapterVersion

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CURRENT_FILE = "current.json"

log = logging.getLogger(__name__)


class AdapterStore:
    """Writes and finds the promoted adapters of a run. room: how long a full disk is waited for."""

    def __init__(self, run_dir: Path, room: Room | None = None) -> None:
        self.folder = run_dir / "adapters"
        self._room = room or Room(self.folder)

    def path(self, version: int) -> Path:
        """The PEFT folder of a version."""
        return self.folder / f"v{version:04d}"

    def write(self, version: AdapterVersion, config_json: str, weights: bytes) -> Path:
        """Store a version and make it the current one; a crash leaves the old or the new, never a part.

        The replacement of current.json commits its round, and nothing else does. Writing it again is harmless.
        Raises OSError, InputError as committed() does.
        """
        return self._room.repeat(partial(self._write, version, config_json, weights))

    def _write(self, version: AdapterVersion, config_json: str, weights: bytes) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.path(version.number)
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_synced(temporary / CONFIG_FILE, config_json.encode())
        write_synced(temporary / WEIGHTS_FILE, weights)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        kept = [known for known in self.committed() if known.number < version.number]
        described = _Current(version.number, (*kept, version))
        write_atomic(self.folder / CURRENT_FILE, msgspec.json.encode(described))
        return final

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

    def committed(self) -> tuple[AdapterVersion, ...]:
        """All promoted versions in order, the last one is current: the one record of what was committed.

        Raises InputError if current.json is damaged.
        """
        path = self.folder / CURRENT_FILE
        if not path.exists():
            return ()
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Current).committed
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} is damaged ({error}): it alone says which rounds count. Restore it, or start a new run"
            ) from error

    def rounds(self, last: int | None = None) -> frozenset[int]:
        """Numbers of the rounds that were committed, by default all, else those of the versions up to `last`.

        Raises InputError as committed() does.
        """
        return frozenset(known.round_id for known in self.committed() if last is None or known.number <= last)

    def current(self) -> AdapterVersion | None:
        """The last promoted version, or None. Raises InputError as committed() does."""
        return self.committed()[-1] if self.committed() else None


class _Current(msgspec.Struct, frozen=True):
    """current.json. version: for readers in a hurry; it is the last one of `committed`."""

    version: int
    committed: tuple[AdapterVersion, ...]

    def __post_init__(self) -> None:
        if not self.committed or self.committed[-1].number != self.version:
            raise ValueError("version is not the last committed one")
