"""Merge the files of all processes and restarts of a run into RUN/run.h5. Free of torch."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np

from clif.errors import InputError
from clif.metrics.schema import TABLES, create
from clif.metrics.sources import Attributes, Part, Problem, Rows, Source, merged_table, read, sources

log = logging.getLogger(__name__)

Read = Callable[[Source], Generator[Part, None, None]]


class CollectError(InputError):
    """There is nothing to merge; the message names the missing files."""


def collect(run_dir: Path) -> Path:
    """Write RUN/run.h5 from every process file, each up to its last flush, and return its path.

    It also works during the run. A file that cannot be read is named in a warning and in the attribute
    `unreadable`, one that its process has not closed in `unclosed`; the others are merged. Raises CollectError when no
    file is there or none can be read.
    """
    return merge(run_dir, find(run_dir), read)


def find(run_dir: Path) -> list[Source]:
    """The process files of a run in the order of run.h5. Raises CollectError when there is none."""
    found = sources(run_dir)
    if not found:
        raise CollectError(
            f"no metrics in {run_dir}: looked for control.h5, rank-00000.h5 and restarts (rank-00000.r1.h5)"
        )
    return found


def merge(run_dir: Path, found: Sequence[Source], read: Read) -> Path:
    """Write RUN/run.h5 from the parts that read yields for each file, in the order of found, and return its path.

    Raises CollectError if no file can be read. After any error an older run.h5 is kept and no other file is left.
    """
    # A folder of its own lets two processes collect at the same time: each writes a whole file, and the later one
    # stays.
    with tempfile.TemporaryDirectory(prefix=".collect-", dir=run_dir) as folder:
        temporary = Path(folder) / "run.h5"
        with h5py.File(temporary, "w") as run:
            for name in TABLES:
                create(run, merged_table(name), compression="gzip", compression_opts=1, shuffle=True)
            run.create_group("sources")
            unreadable = _take_all(found, read, run)
            if not len(run["sources"]):
                raise CollectError(f"none of the metrics files in {run_dir} can be read: {'; '.join(unreadable)}")
            names = [source.name for source in found if source.name in run["sources"]]
            unclosed = [name for name in names if not run["sources"][name].attrs["closed"]]
            run.attrs["unreadable"] = np.array(unreadable, dtype=h5py.string_dtype())
            run.attrs["unclosed"] = np.array(unclosed, dtype=h5py.string_dtype())
        os.replace(temporary, run_dir / "run.h5")
    for problem in unreadable:
        log.warning("not merged: %s", problem)
    if unclosed:
        log.warning("not closed (killed, or still running), taken up to the last flush: %s", ", ".join(unclosed))
    return run_dir / "run.h5"


def _take_all(found: Sequence[Source], read: Read, run: h5py.File) -> list[str]:
    """Append the rows of all files; returns descriptions of unreadable ones."""
    problems: list[str] = []
    for source in found:
        with closing(read(source)) as parts:
            problems += [f"{source.path.name}: {problem}" for problem in _take(source, parts, run)]
    return problems


def _take(source: Source, parts: Iterator[Part], run: h5py.File) -> list[str]:
    problems: list[str] = []
    group, last = None, math.nan
    for part in parts:
        if isinstance(part, Problem):
            problems.append(part.text)
        elif isinstance(part, Attributes):
            group = run["sources"].create_group(source.name)
            group.attrs.update(part.values)
        else:
            _append(part, run[part.table])
            last = float(np.fmax.reduce(part.rows["t"], initial=last))
    if group is not None:
        # The writer notes the end when it closes, so a kill leaves NaN.
        group.attrs["closed"] = math.isfinite(float(group.attrs.get("end_s", math.nan)))
        group.attrs["last_row_s"] = last
    return problems


def _append(part: Rows, target: h5py.Dataset) -> None:
    start = len(target)
    target.resize((start + len(part.rows),))
    target[start:] = part.rows
