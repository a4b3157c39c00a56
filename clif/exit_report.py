"""The last output of a process: a sentence for an error of the user, a traceback for a bug. Free of torch."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from clif.errors import InputError

SPEAK_S = 2.0
"""Seconds that a rank waits for rank 0 to print the same error."""
WRONG_INPUT = 2
"""Exit code after a sentence."""
ROOM = "make room, then go on with run.resume=true"
ALLOW = "give yourself the permission, or name another place"
SAID = "clif/said"
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EACCES: ALLOW,
    errno.EPERM: ALLOW,
    errno.EROFS: ALLOW,
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the host has no more open files to give: raise fs.file-max",
    errno.ENOMEM: "the host has no memory left: start fewer ranks, or a smaller model",
    errno.EADDRINUSE: "another process uses this port: end it, or give the launcher another one",
    errno.EADDRNOTAVAIL: "give an address of this host",
    errno.ENAMETOOLONG: "give a shorter name",
}


class Counter(Protocol):
    """The part of torch.distributed.Store that is used: a store of this start alone."""

    def add(self, key: str, amount: int, /) -> int: ...


class ReportedExit(Exception):
    """This process ends, and the reason has been printed. code: its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"ends with code {code}")
        self.code = code


def sentence_of(error: BaseException) -> str | None:
    """The sentence for the user; None for a bug, which needs its traceback. The one place that decides this."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        return _of_the_system(error)
    text = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"the host has no memory left ({text or 'out of memory'}): start fewer ranks, or a smaller model"
    # Compared by name: this file is free of torch.
    if type(error).__name__ == "OutOfMemoryError":
        first = text.splitlines()[0] if text else "out of memory"
        return (
            f"{first}: lower engine.kv_tokens, engine.activation_mib or train.max_micro_batch, or raise layout.tp_size"
        )
    return None


def _of_the_system(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror}" + (f": {remedy}" if remedy else "")


@contextmanager
def last_words(rank: int = 0, store: Counter | None = None) -> Iterator[None]:
    """Print the sentence of an error that ends the block, if it has one, and raise ReportedExit instead.

    A launcher kills all ranks after one has ended. So the other ranks wait for rank 0: if it met the same error, they
    are killed before they repeat it, or see it in the store; otherwise they print it themselves.
    """
    try:
        yield
    except Exception as error:
        words = sentence_of(error)
        if words is None:
            raise
        if rank:
            time.sleep(SPEAK_S)
        if store is None or store.add(SAID, 1) == 1:
            print(f"error on rank {rank}: {words}" if rank else f"error: {words}", file=sys.stderr, flush=True)
        raise ReportedExit(WRONG_INPUT) from error
