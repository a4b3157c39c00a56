"""A rank's training state on disk: one safetensors file, replaced atomically, written beside the serving loop."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch


@dataclass(frozen=True)
class Checkpoint:
    """State after a committed round: the trainer's snapshot, the sample cursor, version and round numbers."""

    version: int
    round_id: int
    trainer: dict[str, Any]
    cursor: dict[str, Any]


class CheckpointWriter:
    """Writes one file per rank. A crash at any moment leaves the former or the new checkpoint, never a part."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank-{rank:05d}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write in a thread of its own. Raises what the former write ended with, say OSError or SafetensorError."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self._replace(checkpoint)
        except Exception as error:  # noqa: BLE001 - a thread cannot raise: wait() does, in the loop's thread
            self._error = error

    def _replace(self, checkpoint: Checkpoint) -> None:
        tensors = {"shadow": checkpoint.trainer["shadow"]}
        tensors |= {f"moments.{k}": v for k, v in checkpoint.trainer["moments"].items()}
        metadata = {
            "version": str(checkpoint.version),
            "round_id": str(checkpoint.round_id),
            "steps": str(checkpoint.trainer["steps"]),
            "cursor": json.dumps(checkpoint.cursor),
        }
        part = self.path.with_suffix(".part")
        safetensors.torch.save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, self.path)


def load_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """Raises FileNotFoundError or safetensors.SafetensorError."""
    with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    moments = {k.removeprefix("moments."): v for k, v in tensors.items() if k.startswith("moments.")}
    trainer = {"shadow": tensors["shadow"], "moments": moments, "steps": int(metadata["steps"])}
    return Checkpoint(int(metadata["version"]), int(metadata["round_id"]), trainer, json.loads(metadata["cursor"]))
