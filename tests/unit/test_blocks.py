"""Blocks of the KV cache: none is lost, none is written by one and read by another, equal beginnings are shared."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clif.engine.blocks import BlockPool


def filled(pool: BlockPool, version: int, tokens: list[int]) -> list[int]:
    """Blocks of a sequence that has computed all its tokens, alone or on top of what it shares."""
    blocks = pool.acquire_cached(version, tokens)
    start = len(blocks) * pool.block_size
    assert pool.allocate(blocks, len(tokens))
    pool.register(version, tokens, blocks, start, len(tokens))
    return blocks


def check(pool: BlockPool, owners: list[list[int]]) -> None:
    held = [block for blocks in owners for block in blocks]
    assert all(len(blocks) == len(set(blocks)) for blocks in owners)
    assert all(pool.ref_count(block) == held.count(block) for block in range(pool.total))
    assert sorted([*pool._free, *pool._cached, *set(held)]) == list(range(pool.total))
    assert pool.used_tokens == pool.block_size * len(set(held)) <= pool.total * pool.block_size


Actions = st.lists(
    st.tuples(st.sampled_from(["new", "drop"]), st.integers(0, 2), st.integers(1, 2), st.integers(1, 60)), max_size=40
)


@given(Actions)
def test_no_block_is_lost_and_only_readers_of_equal_tokens_share_one(actions):
    pool = BlockPool(256, 8)
    owned: list[tuple[int, list[int], list[int]]] = []
    for action, version, token, length in actions:
        tokens = [token] * length
        if action == "drop" and owned:
            pool.free(owned.pop(length % len(owned))[2])
        elif pool.blocks_for(length) <= pool.available:
            # Room for it even if it shares nothing.
            owned.append((version, tokens, filled(pool, version, tokens)))
        check(pool, [blocks for _, _, blocks in owned])
        for version_a, tokens_a, blocks_a in owned:
            for version_b, tokens_b, blocks_b in owned:
                for at, block in enumerate(blocks_a):
                    if block in blocks_b:
                        stop = (at + 1) * 8
                        assert blocks_b[at] == block and version_a == version_b
                        assert blocks_a is blocks_b or (
                            tokens_a[:stop] == tokens_b[:stop] and stop <= len(tokens_a) and stop <= len(tokens_b)
                        )


def test_growing_takes_all_or_nothing():
    pool, blocks = BlockPool(32, 8), []
    assert pool.allocate(blocks, 9) and len(blocks) == 2
    assert pool.allocate(blocks, 16) and len(blocks) == 2, "what it has is enough"
    assert not pool.allocate(blocks, 33) and len(blocks) == 2 and pool.used_tokens == 16


def test_the_last_token_is_always_computed():
    pool = BlockPool(256, 8)
    filled(pool, 0, [1] * 16)
    assert [len(pool.acquire_cached(0, [1] * n)) for n in (8, 9, 16, 17, 40)] == [0, 1, 1, 2, 2]


def test_blocks_of_another_version_are_never_found():
    pool = BlockPool(256, 8)
    pool.free(filled(pool, 1, [1] * 24))
    assert all(not pool.acquire_cached(version, [1] * 24) for version in (0, 2, 11))
    assert len(pool.acquire_cached(1, [1] * 24)) == 2


def test_equal_tokens_after_another_beginning_are_not_found():
    pool = BlockPool(256, 8)
    pool.free(filled(pool, 0, [1] * 8 + [2] * 8))
    assert pool.acquire_cached(0, [3] * 8 + [2] * 8 + [4]) == [] == pool.acquire_cached(0, [2] * 9)


def test_a_block_that_is_not_full_is_not_found():
    pool = BlockPool(256, 8)
    filled(pool, 0, [1] * 15)
    assert len(pool.acquire_cached(0, [1] * 15)) == 1


def test_cached_blocks_are_evicted_least_recently_used_first_and_ends_before_beginnings():
    pool = BlockPool(48, 8)
    old, new = [[token] * 16 for token in (1, 2)]
    pool.free(filled(pool, 0, old))
    pool.free(filled(pool, 0, new))
    pool.free(pool.acquire_cached(0, [*old, 9]))
    assert pool.available == 6 and pool.used_tokens == 0
    known = lambda tokens: len(pool._table.find(0, [*tokens, 9]))  # noqa: E731
    seen, mine = [], []
    for count in range(1, 7):
        assert pool.allocate(mine, count * 8)
        seen.append((known(old), known(new)))
    assert seen == [(2, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]
    assert not pool.allocate(mine, 56)


def test_what_two_computed_at_the_same_time_is_found_once_and_none_of_it_is_lost():
    pool = BlockPool(96, 8)
    blocks: list[list[int]] = [[], []]
    for mine in blocks:
        pool.allocate(mine, 16)
    for mine in blocks:
        pool.register(0, [1] * 16, mine, 0, 16)
    pool.free(blocks[1])
    check(pool, blocks[:1])
    assert pool.acquire_cached(0, [1] * 17) == blocks[0]
    pool.free(blocks[0])
    pool.free(blocks[0])
    check(pool, [])


def test_the_second_of_two_equal_sequences_can_go_on_to_be_shared():
    pool = BlockPool(96, 8)
    first, second = [], []
    for mine in (first, second):
        pool.allocate(mine, 8)
        pool.register(0, [1] * 8, mine, 0, 8)
    pool.allocate(second, 16)
    pool.register(0, [1] * 16, second, 8, 16)
    assert pool.acquire_cached(0, [1] * 17) == [first[0], second[1]]
