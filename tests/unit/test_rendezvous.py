"""All processes of one start agree, whatever earlier starts have left in the store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from clif.distributed.rendezvous import agree_on_start, fewest_restarts


def start(store: dist.Store, ranks: int, absent: tuple[int, ...] = (), timeout_s: float = 20.0) -> list[str]:
    with ThreadPoolExecutor(ranks) as pool:
        parts = [pool.submit(agree_on_start, store, r, ranks, timeout_s) for r in range(ranks) if r not in absent]
        return [part.result() for part in parts]


def test_every_start_has_a_name_of_its_own_that_all_ranks_know():
    store = dist.HashStore()
    names = [start(store, 4) for _ in range(3)]
    assert all(len(set(of_ranks)) == 1 for of_ranks in names)
    assert len({of_ranks[0] for of_ranks in names}) == 3


def test_ranks_that_asked_and_died_do_not_confuse_the_next_start():
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match=r"rank 0 does not answer|ranks \[(1, )?2\] did not come"):
        start(store, 3, absent=(2,), timeout_s=0.3)
    assert len(set(start(store, 3))) == 1


def test_a_rank_that_comes_late_is_waited_for():
    store = dist.HashStore()
    late = threading.Timer(0.3, lambda: agree_on_start(store, 1, 2, 20.0))
    late.start()
    assert agree_on_start(store, 0, 2, 20.0)
    late.join()


def test_the_host_with_the_fewest_restarts_left_decides():
    """Each host's torchrun counts for itself and gives up by itself."""
    store, left = dist.HashStore(), (3, 1, 2)
    with ThreadPoolExecutor(3) as pool:
        parts = [pool.submit(fewest_restarts, store, rank, 3, mine) for rank, mine in enumerate(left)]
    assert parts[0].result() == 1
