"""Process files of a made-up run, and all that a run.h5 holds, to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clif.metrics.schema import CONTROL_TABLES, RANK_TABLES
from clif.metrics.writer import TableWriter, next_path


def write_step(writer: TableWriter, number: int) -> None:
    writer.row("ticks", step=number, seconds=0.1, decode_rows=1, prefill_tokens=0, running=1, waiting=0, kv_used=16)


def write_run(run_dir: Path, rows: list[int]) -> None:
    """A control file and one file per entry of rows, two of them of each rank; ranks write attributes of all kinds."""
    with TableWriter(run_dir / "control.h5", CONTROL_TABLES, {"host": "a", "config": "x" * 30_000}) as writer:
        for number in range(rows[0] if rows else 0):
            writer.row("gaps", request=number, itl_s=number / 7)
    for file, count in enumerate(rows):
        attributes = {"host": f"h{file}", "names": ["é", "b"], "sizes": np.arange(3), "empty": h5py.Empty("f8")}
        with TableWriter(next_path(run_dir, f"rank-{file // 2:05d}"), RANK_TABLES, attributes) as writer:
            for number in range(count):
                write_step(writer, number)
                writer.row("device", rss_bytes=float(number))


def left_over(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.iterdir() if path.suffix != ".h5"]


def contents(run_h5: Path) -> dict[str, Any]:
    """Attributes of all objects, types and shapes with them, and the bytes of all tables."""
    found: dict[str, Any] = {}

    def take(name: str, thing: Any) -> None:
        found[f"{name}@"] = {
            key: (str(thing.attrs.get_id(key).dtype), thing.attrs.get_id(key).shape, repr(value))
            for key, value in thing.attrs.items()
        }
        if isinstance(thing, h5py.Dataset):
            found[name] = (str(thing.dtype), thing.shape, thing.chunks, thing.compression, thing[:].tobytes())

    with h5py.File(run_h5) as run:
        take("/", run)
        run.visititems(take)
    return found
