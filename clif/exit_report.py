"""What a process says when it ends: a sentence for what a person can mend, a traceback for a bug. Free of torch."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from clif.errors import InputError

SPEAK_S = 2.0
"""How long a rank waits for rank 0 to say the same."""
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
    """What is used of torch.distributed.Store: of this start alone."""

    def add(self, key: str, amount: int, /) -> int: ...


class Over(Exception):
    """This process ends, and why has been said. code: what it exits with."""

    def __init__(self, code: int) -> None:
        super().__init__(f"ends with code {code}")
        self.code = code


def sentence_of(error: BaseException) -> str | None:
    """What to tell a person; None for a bug, whose traceback is wanted. The one place that decides this."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        return _of_the_system(error)
    text = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"the host has no memory left ({text or 'out of memory'}): start fewer ranks, or a smaller model"
    # By name: this file is free of torch.
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
    """Says in one sentence what ends the block, if it has one, and raises Over in its place.

    A launcher kills all ranks when one ends. So the others let rank 0 speak first: if it met the same, they are gone
    before they repeat it, or see it in the store, and otherwise nobody else would have said it.
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
        raise Over(WRONG_INPUT) from error
