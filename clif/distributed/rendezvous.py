"""The ranks of one start agree on a name for it, and on how many restarts are left.

torchrun restarts the ranks but not its key-value store, which keeps the keys of earlier starts. A rank must not mistake
one of them for an answer of this start. torchrun's restart count does not help, since it differs between hosts. So
every process asks under a random name of its own, for which the store holds no earlier answer.
"""

from __future__ import annotations

import secrets
import time
from typing import Protocol

POLL_S = 0.005


class KeyValues(Protocol):
    """The part of torch.distributed.Store that is used here."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


class LocalStore:
    """The store of a start that is one process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self._values[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        return self._values[key]

    def check(self, keys: list[str], /) -> bool:
        return all(key in self._values for key in keys)


def agree_on_start(store: KeyValues, rank: int, world_size: int, timeout_s: float) -> str:
    """A name that all processes of this start share and no earlier one had. Collective over all ranks.

    Raises TimeoutError if a rank does not arrive within timeout_s.
    """
    mine, deadline = secrets.token_hex(8), time.monotonic() + timeout_s
    if rank == 0:
        _answer_all(store, mine, world_size, deadline)
        return mine
    store.set(f"clif/start/asks/{rank}", mine)
    _wait_for(store, f"clif/start/answer/{mine}", deadline, "rank 0 does not answer")
    name = store.get(f"clif/start/answer/{mine}").decode()
    store.set(f"clif/start/heard/{name}/{rank}", "")
    return name


def _answer_all(store: KeyValues, name: str, world_size: int, deadline: float) -> None:
    answered: dict[int, bytes] = {}
    left = set(range(1, world_size))
    while left:
        for rank in sorted(left):
            if not store.check([f"clif/start/asks/{rank}"]):
                continue
            # The request may stem from the same rank of an earlier start; then no process reads the answer.
            asked = store.get(f"clif/start/asks/{rank}")
            if answered.get(rank) != asked:
                store.set(f"clif/start/answer/{asked.decode()}", name)
                answered[rank] = asked
            if store.check([f"clif/start/heard/{name}/{rank}"]):
                left.discard(rank)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(left)} did not come: see their logs, or raise dist.timeout_s")
        time.sleep(POLL_S)


def _wait_for(store: KeyValues, key: str, deadline: float, complaint: str) -> None:
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint}: see its log, or raise dist.timeout_s")
        time.sleep(POLL_S)


def fewest_restarts(store: KeyValues, rank: int, world_size: int, mine: int) -> int:
    """On rank 0 the least number of restarts left on any rank, on the others their own. Collective.

    store: of this start alone. Each host's torchrun counts its own restarts and gives up on its own: a lost rank comes
    back only if its host has a restart left. Raises the store's error if a rank does not arrive.
    """
    store.set(f"clif/restarts_left/{rank}", str(mine))
    if rank != 0:
        return mine
    return min(int(store.get(f"clif/restarts_left/{r}")) for r in range(world_size))
