"""A rank's training state on disk, written while serving goes on, so that a crash at any moment loses no round.

Before a member votes, its state after the round is on disk as the *prepared* checkpoint. The control process alone
commits the round, when it stores the adapter. Hence after a crash every member finds its state for the last committed
round: the prepared one if it belongs to that round, otherwise the one that was kept.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from clif.engine.streams import Context, same_stream
from clif.errors import InputError
from clif.storage.disk_space import Room, is_full

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """State after a round: the trainer's snapshot and the sample cursor, as if the round were committed.

    version: the adapter version it was made under; round_id: the round it belongs to.
    """

    version: int
    round_id: int
    trainer: dict[str, Any]
    cursor: dict[str, Any]


class CheckpointWriter:
    """Two files per rank: the kept and the prepared checkpoint. Each is replaced as a whole, in a thread of its own.

    shadow [n]: that of the checkpoint that was written last, in the host's memory; nothing changes it.

    That thread waits while the disk is full. All methods but committed() and remove() raise the error of the write
    before, such as OSError or SafetensorError. prepare(), installed() and wait() wait for that write to end.
    """

    def __init__(self, folder: Path, rank: int, job: str = "") -> None:
        """job: whose training it is; empty: that of the run's own data."""
        name = f"rank-{rank:05d}" + (f".{job}" if job else "")
        self.path = folder / f"{name}.safetensors"
        self.prepared = folder / f"{name}.prepared.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._keep = False
        self._removed = False
        self.shadow = torch.empty(0)

    def prepare(self, checkpoint: Checkpoint) -> None:
        """Write what will hold if the round is committed. It must be done() before the vote.

        After remove() it only sets the shadow: a round that is under way still ends.
        """
        self.wait()
        if self._keep and not self._removed:
            # Its round is committed. It does not move earlier: until a round begins, its adapter may not be on disk.
            os.replace(self.prepared, self.path)
        self._keep = False
        self._start(checkpoint, self.prepared)

    def committed(self) -> None:
        """The prepared checkpoint belongs to a round that was committed: the next one must not replace it."""
        self._keep = True

    def installed(self, checkpoint: Checkpoint) -> None:
        """Write what holds after a committed round in which this rank took no part."""
        self.wait()
        self._keep = False
        self._start(checkpoint, self.path)

    def remove(self) -> None:
        """Delete both files: nothing continues from them. Waits for no write; one that waits for room is given up."""
        self._removed = True
        if self._thread is None or not self._thread.is_alive():
            self._delete()
            return
        self._thread = threading.Thread(target=self._delete_after, args=(self._thread,), name="checkpoint")
        self._thread.start()

    def done(self) -> bool:
        """Whether nothing is being written. Raises the error of the last write."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Wait until nothing is being written. Raises the error of the last write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _start(self, checkpoint: Checkpoint, path: Path) -> None:
        stream = same_stream(checkpoint.trainer["shadow"])
        self._thread = threading.Thread(target=self._write, args=(checkpoint, path, stream), name="checkpoint")
        self._thread.start()

    def _write(self, checkpoint: Checkpoint, path: Path, stream: Context) -> None:
        """stream: where the checkpoint's tensors are computed."""
        try:
            with stream:
                tensors = _on_host(checkpoint)
            self.shadow = tensors["shadow"]
            if not self._removed:
                Room(path, give_up=self._over).repeat(partial(_replace, checkpoint, tensors, path))
        except Exception as error:  # noqa: BLE001 - a thread cannot raise: wait() does, in the loop's thread
            self._error = error

    def _over(self) -> str:
        return "nothing continues from it" if self._removed else ""

    def _delete_after(self, writing: threading.Thread) -> None:
        writing.join()
        if self._error is not None and is_full(self._error):
            # It was given up, which a round that is under way need not know.
            log.info("a checkpoint that is needed no longer was not written: %s", self._error)
            self._error = None
        try:
            self._delete()
        except OSError as error:
            log.warning("a checkpoint that is needed no longer is not deleted: %s", error)

    def _delete(self) -> None:
        for path in (self.path, self.prepared):
            path.unlink(missing_ok=True)
            # Of a write that failed.
            _part(path).unlink(missing_ok=True)


def _on_host(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    tensors = {"shadow": checkpoint.trainer["shadow"]}
    tensors |= {f"moments.{k}": v for k, v in checkpoint.trainer["moments"].items()}
    return {k: v.cpu().contiguous() for k, v in tensors.items()}


def _replace(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], path: Path) -> None:
    metadata = {
        "version": str(checkpoint.version),
        "round_id": str(checkpoint.round_id),
        "steps": str(checkpoint.trainer["steps"]),
        "cursor": json.dumps(checkpoint.cursor),
    }
    part = _part(path)
    safetensors.torch.save_file(tensors, part, metadata)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _part(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_suffix(".part")


def load_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """Raises FileNotFoundError, and InputError for a damaged file."""
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        moments = {k.removeprefix("moments."): v for k, v in tensors.items() if k.startswith("moments.")}
        trainer = {"shadow": tensors["shadow"], "moments": moments, "steps": int(metadata["steps"])}
        return Checkpoint(int(metadata["version"]), int(metadata["round_id"]), trainer, json.loads(metadata["cursor"]))
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"the checkpoint {path} is damaged ({error}): restore it or delete it. Without it this rank goes on from "
            "its other checkpoint, or with fresh moments and from the first sample"
        ) from error


def find_checkpoint(writer: CheckpointWriter, rounds: Set[int], device: torch.device) -> Checkpoint | None:
    """The rank's state after the last committed round it knows; rounds: those that were committed. None: it has none.

    The writer then keeps that one. Raises InputError for a damaged file.
    """
    found = [load_checkpoint(path, device) for path in (writer.path, writer.prepared) if path.is_file()]
    known = [c for c in found if c.round_id in rounds]
    best = max(known, key=lambda c: c.round_id, default=None)
    if best is not None and best is found[-1] and writer.prepared.is_file():
        writer.committed()
    return best
