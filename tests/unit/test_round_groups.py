"""Process groups of rounds: when one is used again, and that members and control process mean the same one."""

from __future__ import annotations

import datetime
import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clif.control.round_groups import GroupNumbers
from clif.distributed.collectives import Exchange
from clif.distributed.round_groups import RoundGroups
from clif.types import GROUPS_KEPT

ALL = ((0, 1), (0, 0))


def sets(n: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [((0, i), (0, 0)) for i in range(1, n + 1)]


def groups(tmp_path: Path, timeout_s: float = 30.0) -> RoundGroups:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    return RoundGroups(0, "gloo", store, torch.device("cpu"), datetime.timedelta(seconds=timeout_s))


def test_members_keep_their_group_until_something_may_be_pending_in_it() -> None:
    numbers = GroupNumbers(2)
    assert [numbers.of(ALL, n) for n in (1, 2)] == [0, 0], "the group of all was made at the start"
    numbers.spoil(ALL)
    assert [numbers.of(ALL, n) for n in (3, 4)] == [3, 3]


def test_a_replica_that_was_rebuilt_needs_a_new_group() -> None:
    numbers = GroupNumbers(2)
    assert numbers.of(((0, 1), (0, 1)), 5) == 5
    assert numbers.of(ALL, 6) == 0


def test_no_number_is_reused_that_a_rank_may_have_closed(tmp_path: Path) -> None:
    """Both keep so many member sets: whatever number the control process gives again, its members still have."""
    numbers, mine = GroupNumbers(1), groups(tmp_path)
    first = {members: numbers.of(members, n) for n, members in enumerate(sets(GROUPS_KEPT + 1), start=1)}
    made = {members: mine.get(members, (0,), number) for members, number in first.items()}
    oldest = next(iter(first))
    assert numbers.of(oldest, 99) == 99
    for members in list(first)[2:]:
        assert numbers.of(members, 100) == first[members]
        assert mine.get(members, (0,), first[members]) is made[members]


def test_a_new_number_closes_the_group_of_before(tmp_path: Path) -> None:
    mine = groups(tmp_path)
    first = mine.get(ALL, (0,), 1).result(10)
    second = mine.get(ALL, (0,), 2).result(10)
    assert first is not second
    with pytest.raises(RuntimeError, match="closed"):
        first.allreduce([torch.ones(1)])
    second.allreduce([torch.ones(1)]).wait()


def test_a_closed_group_leaves_no_descriptor_and_no_thread_behind(tmp_path: Path) -> None:
    mine = groups(tmp_path)
    mine.get(ALL, (0,), 0).result(10)

    def held() -> int:
        return len(os.listdir("/proc/self/fd")) + len(os.listdir("/proc/self/task"))

    before = held()
    for number in range(1, 20):
        mine.get(ALL, (0,), number).result(10)
    end = time.monotonic() + 10
    while held() > before:
        assert time.monotonic() < end, f"{held()} descriptors and threads, {before} before"
        time.sleep(0.01)


def test_nobody_waits_any_more_for_the_members_of_a_group_that_was_given_up(tmp_path: Path) -> None:
    mine, before = groups(tmp_path, timeout_s=600.0), threading.active_count()
    waiting = mine.get(ALL, (0, 1), 1)
    mine.retire(ALL)
    assert "given up before ranks [1] came" in str(waiting.exception(10))
    end = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < end, "its thread is left"


def test_a_member_that_does_not_come_is_named(tmp_path: Path) -> None:
    waiting = groups(tmp_path, timeout_s=0.1).get(ALL, (0, 1), 4)
    assert "ranks [1] did not come within 0.1 s" in str(waiting.exception(10))


def test_an_exchange_over_gloo_goes_over_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo supports only all-reduce and broadcast for tensors of a GPU."""
    group, copied = groups(tmp_path).get(ALL, (0,), 1).result(10), list[torch.Tensor]()
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tensor) or tensor)
    exchange = Exchange([torch.ones(3)], 0, group)
    while not exchange.done():
        time.sleep(0.01)
    assert len(copied) == 1 and exchange.result().tolist() == [[1.0, 1.0, 1.0]]
