"""Promoted adapters on disk: RUN/adapters/vNNNN (a PEFT folder) and RUN/adapters/current.json, both atomic.

Free of torch: the control process writes them, replicas read them when a run is resumed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec

from clif.types import AdapterVersion

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CURRENT_FILE = "current.json"
VERSION_FILE = "version.json"


class AdapterStore:
    """Writes and finds the promoted adapters of a run."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "adapters"

    def place(self, version: int) -> Path:
        """The PEFT folder of a version."""
        return self.folder / f"v{version:04d}"

    def write(self, version: AdapterVersion, config_json: str, weights: bytes) -> Path:
        """Store a version and make it the current one; a crash leaves the old or the new, never a part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.place(version.number)
        temporary = self.folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write(temporary / CONFIG_FILE, config_json.encode())
        _write(temporary / WEIGHTS_FILE, weights)
        described = json.dumps(msgspec.to_builtins(version)).encode()
        _write(temporary / VERSION_FILE, described)
        # Left over from a crash before current.json named it, so nobody reads it.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        current = {"version": version.number, "round_id": version.round_id, "heldout_loss": version.heldout_loss}
        write_atomic(self.folder / CURRENT_FILE, json.dumps(current).encode())
        return final

    def weights(self, version: int) -> bytes:
        """The safetensors file of a version. Raises OSError."""
        return (self.place(version) / WEIGHTS_FILE).read_bytes()

    def rounds(self, last: int | None = None) -> frozenset[int]:
        """Numbers of the rounds that were committed: those of all versions up to `last`, by default the current one.

        Raises ValueError if a file is damaged.
        """
        current = self.current()
        if current is None:
            return frozenset()
        last = current.number if last is None else last
        found = {current.round_id} if current.number == last else set()
        for path in self.folder.glob(f"v*/{VERSION_FILE}"):
            try:
                version = msgspec.json.decode(path.read_bytes(), type=AdapterVersion)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path} is damaged ({error}): restore it or start a new run") from error
            # A later folder was written by a process that died before it could make it the current one.
            if version.number <= last:
                found.add(version.round_id)
        return frozenset(found)

    def current(self) -> AdapterVersion | None:
        """The last promoted version, or None. Raises ValueError if current.json is damaged."""
        path = self.folder / CURRENT_FILE
        if not path.exists():
            return None
        try:
            tree = json.loads(path.read_text())
            return AdapterVersion(
                number=int(tree["version"]), round_id=int(tree["round_id"]), heldout_loss=float(tree["heldout_loss"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): restore it or start a new run") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file as a whole: readers see the old or the new content."""
    temporary = path.with_name(f".{path.name}.tmp")
    _write(temporary, content)
    os.replace(temporary, path)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
