"""The sample cursor: whatever is rolled back or interrupted, no sample is counted twice or lost."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clif.data.cursor import SampleCursor, fingerprint
from clif.errors import InputError
from clif.types import TrainSample

STEPS = st.lists(
    st.tuples(st.sampled_from(("commit", "release", "defer", "keep", "crash")), st.integers(0, 7)), max_size=40
)


def resumed(cursor: SampleCursor) -> SampleCursor:
    again = SampleCursor(cursor.n, cursor.seed, cursor.data)
    again.restore(json.loads(json.dumps(cursor.state())))
    return again


@given(st.integers(1, 9), st.integers(0, 2**32), STEPS)
def test_every_epoch_commits_each_sample_once_through_rollbacks_and_crashes(n, seed, steps):
    cursor, done, kept = SampleCursor(n, seed), Counter(), []
    for action, k in steps:
        if action == "crash":
            cursor, kept = resumed(cursor), []
            continue
        ids = cursor.claim(k)
        assert len(ids) == k
        if action == "commit":
            cursor.commit(ids)
            done.update(ids)
        elif action == "release":
            cursor.release(ids)
        elif action == "defer":
            cursor.defer(ids)
        else:
            kept += ids
        assert Counter(cursor.claimed) == Counter(kept)
    assert cursor.committed == done.total()
    # Finish what is open, up to the end of the epoch: every sample was then done once per epoch.
    cursor.commit(kept)
    done.update(kept)
    rest = cursor.claim((cursor.epoch + 1) * n - done.total())
    cursor.commit(rest)
    done.update(rest)
    assert done == Counter({i: cursor.epoch + 1 for i in range(n)})


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_a_released_claim_is_claimed_again_first(n, k, more):
    cursor = SampleCursor(n, 0)
    first = cursor.claim(k)
    cursor.release(first)
    assert cursor.claim(k + more)[:k] == first


def test_what_came_to_nothing_comes_again_late_in_the_epoch_and_in_another_order():
    cursor, repeated = SampleCursor(24, 0), SampleCursor(8, 0)
    first = cursor.claim(8)
    cursor.defer(first)
    assert set(cursor.claim(16)).isdisjoint(first), "others first"
    again = cursor.claim(8)
    assert sorted(again) == sorted(first) and again != first
    orders = []
    for _ in range(4):
        orders.append(tuple(repeated.claim(8)))
        repeated.defer(orders[-1])
    assert len(set(orders)) == 4, "also where each round takes all samples"


def test_a_checkpoint_of_before_samples_could_be_deferred_is_taken():
    old = {name: value for name, value in SampleCursor(4, 0).state().items() if not name.startswith("defer")}
    cursor = SampleCursor(4, 0)
    cursor.restore(old)
    assert cursor.claim(4) == SampleCursor(4, 0).claim(4)


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 9), st.integers(0, 30))
def test_a_resumed_cursor_goes_on_where_the_checkpoint_was(n, committed, in_flight, then):
    cursor = SampleCursor(n, 3)
    cursor.commit(cursor.claim(committed))
    lost = cursor.claim(in_flight)
    copy = resumed(cursor)
    cursor.release(lost)
    assert copy.committed == committed
    assert copy.claim(then) == cursor.claim(then)


def test_order_depends_on_seed_and_epoch():
    def epochs(seed: int) -> list[list[int]]:
        cursor = SampleCursor(50, seed)
        return [cursor.claim(50), cursor.claim(50)]

    one, two = epochs(1)
    assert sorted(one) == sorted(two) == list(range(50))
    assert one != two
    assert epochs(1) == [one, two]
    assert epochs(2) != [one, two]


def test_settling_what_is_not_claimed_is_an_error_and_changes_nothing():
    cursor = SampleCursor(4, 0)
    a, b = cursor.claim(2)
    for settle in (cursor.commit, cursor.release, cursor.defer):
        with pytest.raises(ValueError, match=rf"samples \[{a}\] are not claimed"):
            settle([a, b, a])
    assert cursor.claimed == (a, b)
    assert cursor.committed == 0
    with pytest.raises(ValueError, match="cannot claim -1"):
        cursor.claim(-1)


def test_a_cursor_needs_samples():
    with pytest.raises(ValueError, match="no training sample"):
        SampleCursor(0, 0)


def samples(*words: int) -> list[TrainSample]:
    return [TrainSample(id=i, ids=(word, 1), target_start=1) for i, word in enumerate(words)]


DATA = fingerprint(samples(5, 6, 7, 8))


@pytest.mark.parametrize(
    ("cursor", "message"),
    [
        (SampleCursor(5, 3, DATA), r"made with 4 training samples but there are 5 now: resume with the same data"),
        (SampleCursor(4, 77, DATA), r"drawn with run\.seed=3, not 77: resume with run\.seed=3, or start a new run"),
        (SampleCursor(4, 3, fingerprint(samples(5, 6, 7, 9))), r"not those of the checkpoint.* same data\.path"),
        (SampleCursor(4, 3, fingerprint(samples(6, 5, 7, 8))), r"not those of the checkpoint.* same data\.path"),
    ],
    ids=["number", "seed", "data", "order"],
)
def test_a_run_goes_on_only_with_the_samples_and_the_order_that_it_began_with(cursor, message):
    began = SampleCursor(4, 3, DATA)
    began.commit(began.claim(3))
    with pytest.raises(InputError, match=message):
        cursor.restore(began.state())
    assert cursor.committed == 0, "nothing is taken over"


@given(n=st.integers(1, 20), before=st.integers(0, 30), claimed=st.integers(0, 30), released=st.integers(0, 5))
def test_a_state_as_if_committed_is_the_state_after_the_commit(n, before, claimed, released):
    cursor = SampleCursor(n, 3)
    cursor.commit(cursor.claim(before))
    cursor.release(cursor.claim(released))
    ids = cursor.claim(claimed)
    ahead = cursor.state(commit=True)
    cursor.commit(ids)
    assert ahead == cursor.state()
