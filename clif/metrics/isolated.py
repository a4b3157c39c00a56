"""Runs work that may hang or crash in a process of its own. Free of torch.

HDF5's library trusts its input: a single flipped bit can make it loop forever or abort.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
LIMIT_S = 60.0
MEMORY_BYTES = 2 << 30
"""A damaged size must not take the host's memory."""
# Forked, because that takes milliseconds; the process only reads and sends, so that inherited state does not matter.
_FORK = multiprocessing.get_context("fork")
_PART, _END, _ERROR = "part", "end", "error"


class Crashed(Exception):
    """The process that did the work died; the message says how."""


def isolated(
    work: Callable[[Callable[[], None]], Iterator[T]],
    limit_s: float = LIMIT_S,
    memory_bytes: int | None = MEMORY_BYTES,
) -> Generator[T, None, None]:
    """Yield what work(alive) yields. Its parts and errors must be picklable.

    The work must call alive(), or yield, at least once in limit_s seconds; otherwise the system ends its process.
    memory_bytes: its limit, beyond the memory of this process; None: no limit.
    Close it to end early. Raises Crashed when that process dies, and what the work raises.
    """
    receiving, sending = _FORK.Pipe(duplex=False)
    child = _FORK.Process(target=_work, args=(work, receiving, sending, limit_s, memory_bytes))
    child.start()
    sending.close()
    try:
        while True:
            try:
                kind, value = receiving.recv()
            except (EOFError, OSError):
                child.join()
                raise Crashed(_how(child.exitcode, limit_s)) from None
            if kind == _END:
                return
            if kind == _ERROR:
                raise value
            yield value
    finally:
        child.kill()
        child.join()
        child.close()
        receiving.close()


def _work(
    work: Callable[[Callable[[], None]], Iterator[Any]],
    receiving: Connection,
    sending: Connection,
    limit_s: float,
    memory_bytes: int | None,
) -> None:
    """The main function of the forked process."""

    def alive() -> None:
        signal.setitimer(signal.ITIMER_REAL, limit_s)

    receiving.close()
    _become_mortal()
    if memory_bytes is not None:
        _limit_memory(memory_bytes)
    alive()
    try:
        for part in work(alive):
            # The receiver may be slow.
            signal.setitimer(signal.ITIMER_REAL, 0)
            sending.send((_PART, part))
            alive()
        sending.send((_END, None))
    except Exception as error:  # noqa: BLE001 - it is raised where the parts are taken
        error.add_note(traceback.format_exc())
        sending.send((_ERROR, error))


def _become_mortal() -> None:
    """Make every signal end this process, also inside a library, and suppress the output of a crash."""
    faulthandler.disable()
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _limit_memory(more_bytes: int) -> None:
    size = psutil.Process().memory_info().vms + more_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    known = [limit for limit in (size, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))


def _how(code: int | None, limit_s: float) -> str:
    if code is not None and code == -signal.SIGALRM:
        return f"HDF5 does not get through it in {limit_s:g} s"
    if code is not None and code < 0:
        return f"HDF5 crashed on it ({signal.Signals(-code).name})"
    return f"the process that reads it ended with code {code}"
