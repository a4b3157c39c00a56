"""A file of samples, in pieces: no step of the control process reads a whole file. Free of torch."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec

from clif.errors import InputError
from clif.types import TrainSample

FILES = "files"
"""Folder of a run: <id>.jsonl as it was uploaded, <id>.samples as it is trained on."""
PIECE = 500
"""Samples of a piece: some milliseconds of work."""
_LENGTH = struct.Struct("<Q")


def samples_path(run_dir: Path, file: str) -> Path:
    return run_dir / FILES / f"{file}.samples"


def rows_path(run_dir: Path, file: str) -> Path:
    return run_dir / FILES / f"{file}.jsonl"


def sweep_files(run_dir: Path, known: Container[str]) -> None:
    """Remove what lies in RUN/files and belongs to no file that is known. Raises OSError."""
    for path in (run_dir / FILES).glob("*"):
        if path.name.partition(".")[0] not in known:
            path.unlink()


def write_samples(path: Path, samples: Iterable[TrainSample]) -> None:
    """Replace a file of samples as a whole, a piece in memory at a time. Raises OSError, and what `samples` raises."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            rest = iter(samples)
            while piece := list(islice(rest, PIECE)):
                body = msgspec.msgpack.encode(piece)
                file.write(_LENGTH.pack(len(body)) + body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pieces(path: Path) -> Iterator[list[TrainSample]]:
    """The samples, piece by piece. Raises InputError for a file that is missing or damaged."""
    try:
        with path.open("rb") as file:
            while head := file.read(_LENGTH.size):
                body = file.read(*_LENGTH.unpack(head))
                yield msgspec.msgpack.decode(body, type=list[TrainSample])
    except (OSError, struct.error, msgspec.DecodeError, UnicodeDecodeError) as error:
        # The client of the job reads it: no folder of the server belongs in it.
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path.name} cannot be read ({why}): upload the file again") from error


def prompt_digest(sample: TrainSample, seed: int) -> int:
    """Orders prompts at random: samples of one prompt have the same number."""
    prompt = msgspec.msgpack.encode((seed, sample.ids[: sample.target_start]))
    return int.from_bytes(hashlib.sha256(prompt).digest()[:8])


def held_out(digests: Sequence[int], share: float) -> frozenset[int]:
    """The prompts that are held out: a share of the different ones, at least one and never all.

    One prompt alone is both trained on and held out: none would be left otherwise.
    """
    ranked = sorted(set(digests))
    if len(ranked) < 2:
        return frozenset(ranked)
    return frozenset(ranked[: min(max(round(share * len(ranked)), 1), len(ranked) - 1)])
