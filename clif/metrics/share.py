"""Collect a run with several processes of an MPI world. Free of torch; mpi4py comes in as an argument.

Process 0 alone writes run.h5, in the same order as a single process. The others read: each copies, checks and converts
the files that process 0 assigns to it, and sends one piece on request. So a process never holds more than a few pieces,
HDF5 need not be built for MPI, small objects are pickled, and rows are sent as plain buffers.

All waiting is polling: a blocking call of MPI would occupy a whole core and could not be interrupted by a signal, so
that temporary files would stay.
"""

from __future__ import annotations

import heapq
import logging
import socket
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from clif.errors import InputError
from clif.metrics.collect import CollectError, find, merge
from clif.metrics.sources import Part, Rows, Source, merged_table, read
from clif.metrics.world import Comm, Request

log = logging.getLogger(__name__)

_ORDER, _ANSWER, _ROWS, _FAILURE = range(1, 5)  # Tags of messages.
_NEXT, _STOP, _END = "next", "stop", "end"  # Orders, and the answer after the last part of a file.
_POLL_S = 1e-3


class ShareError(RuntimeError):
    """Another process failed; the message says why."""


@dataclass(frozen=True)
class _Announced:
    """Rows of a table that come in the next message."""

    table: str
    count: int


@dataclass(frozen=True)
class _Line:
    """This process's side of the connection. check raises if the process must end."""

    comm: Comm
    check: Callable[[], None]

    def receive(self, source: int, tag: int) -> Any:
        """The next message. Raises ShareError if another process reports a failure."""

        def there() -> bool:
            if self.comm.iprobe(tag=_FAILURE):
                raise ShareError(self.comm.recv(tag=_FAILURE))
            return self.comm.iprobe(source=source, tag=tag)

        self._until(there, _POLL_S)
        return self.comm.recv(source=source, tag=tag)

    def finish(self, transfer: Request) -> None:
        """Wait for a transfer. It is under way, so the processor is yielded without sleeping."""
        self._until(transfer.Test, 0)

    def _until(self, done: Callable[[], bool], pause_s: float) -> None:
        while True:
            self.check()
            if done():
                return
            time.sleep(pause_s)


def collect_shared(run_dir: Path, comm: Comm, check: Callable[[], None] = lambda: None) -> Path | None:
    """Write RUN/run.h5 as collect() does; every process of comm, of which there are two or more, must call it.

    check is called while waiting and between pieces; its error ends this process, and so all of them. Returns the path
    in process 0 and None in the others. Raises CollectError, in process 0, if there is nothing to merge. On any other
    error of any process, process 0 prints it, removes what it has written, and ends all processes by MPI's Abort.
    """
    line = _Line(comm, check)
    if comm.Get_rank() == 0:
        return _lead(run_dir, line)
    _serve(line)
    return None


def shares(sizes: Sequence[int], readers: int) -> list[int]:
    """The reader (0 to readers - 1) of each file: the largest files first, each to the reader with the fewest bytes.

    sizes: bytes of the files, in any order.
    """
    loads = [(0, reader) for reader in range(readers)]
    owners = [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        load, reader = loads[0]
        owners[number] = reader
        heapq.heapreplace(loads, (load + sizes[number], reader))
    return owners


def _lead(run_dir: Path, line: _Line) -> Path:
    comm = line.comm
    readers = range(1, comm.Get_size())
    try:
        found = find(run_dir)
        owners = [readers[owner] for owner in shares([_size(source) for source in found], len(readers))]
        for reader in readers:
            mine = [source for source, owner in zip(found, owners, strict=True) if owner == reader]
            comm.send(mine, dest=reader, tag=_ORDER)
        owner_of = dict(zip(found, owners, strict=True))
        path = merge(run_dir, found, lambda source: _ask(line, owner_of[source]))
    except CollectError:
        _stop(comm)
        raise
    except BaseException as error:
        # Readers wait for orders, or for a transfer that is never received. merge() has removed its file by now.
        log.critical("collecting failed: %s", _said(error))
        comm.Abort(1)
        raise
    _stop(comm)
    return path


def _stop(comm: Comm) -> None:
    for reader in range(1, comm.Get_size()):
        comm.send(_STOP, dest=reader, tag=_ORDER)


def _said(error: BaseException) -> str:
    if isinstance(error, (ShareError, InputError)):
        return str(error)
    return traceback.format_exc() if isinstance(error, Exception) else f"ended by {error!r}"


def _size(source: Source) -> int:
    try:
        return source.path.stat().st_size
    except OSError:
        return 0  # It has disappeared; its reader reports that.


def _ask(line: _Line, reader: int) -> Generator[Part, None, None]:
    """The parts of the file that is next at a reader. Raises ShareError when any reader failed."""
    while True:
        line.comm.send(_NEXT, dest=reader, tag=_ORDER)
        answer = line.receive(reader, _ANSWER)
        if answer == _END:
            return
        if isinstance(answer, _Announced):
            rows = np.empty(answer.count, dtype=merged_table(answer.table).dtype)
            line.finish(line.comm.Irecv(rows.view(np.uint8), source=reader, tag=_ROWS))
            answer = Rows(answer.table, rows)
        yield answer


def _serve(line: _Line) -> None:
    """Send this process's files, part by part, until the order to stop."""
    try:
        mine = line.receive(0, _ORDER)
        if mine == _STOP:
            return
        for source in mine:
            if not _hand_out(line, source):
                return
    except BaseException as error:
        text = f"process {line.comm.Get_rank()} on {socket.gethostname()}: {_said(error)}"
        line.comm.send(text, dest=0, tag=_FAILURE)
        if not isinstance(error, Exception):
            raise
    # Process 0 announces the end, or ends this process: an earlier exit could end process 0 before its cleanup.
    while line.receive(0, _ORDER) != _STOP:
        pass


def _hand_out(line: _Line, source: Source) -> bool:
    """Send one file; False after the order to stop. Parts are read ahead, so that reading and writing overlap."""
    if not source.path.exists():
        raise InputError(
            f"{source.path} is not there: put the run where all hosts see it, or start the processes on one host"
        )
    with closing(read(source)) as parts:
        for part in chain(parts, (_END,)):
            if line.receive(0, _ORDER) == _STOP:
                return False
            _answer(line, part)
    return True


def _answer(line: _Line, part: Part | str) -> None:
    if not isinstance(part, Rows):
        line.comm.send(part, dest=0, tag=_ANSWER)
        return
    line.comm.send(_Announced(part.table, len(part.rows)), dest=0, tag=_ANSWER)
    line.finish(line.comm.Isend(part.rows.view(np.uint8), dest=0, tag=_ROWS))
