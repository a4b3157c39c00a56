"""What a restarted control process goes on with: no accepted request is lost, none comes twice (promise 1)."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from clif.control.durability.journal import (
    Accepted,
    Began,
    Elapsed,
    Ended,
    Entered,
    Line,
    RoundBegan,
    RoundStored,
    VersionGiven,
)
from clif.control.durability.recovery import Recorded, Recovery, add_up, fingerprint, hands_over, recover
from clif.data.load import ScheduledRequest
from clif.types import FinishReason, Request, Sampling


def load_of(n: int, tokens: int = 4) -> list[ScheduledRequest]:
    return [
        ScheduledRequest(at_s=float(i), request=Request(id=i, prompt=(i,), sampling=Sampling(max_tokens=tokens)))
        for i in range(n)
    ]


def accept(scheduled: ScheduledRequest) -> Accepted:
    return Accepted(request=scheduled.request, arrival_unix=1e9 + scheduled.at_s, at_s=scheduled.at_s)


def end(id: int) -> Ended:
    return Ended(id=id, finish=FinishReason.STOP, detail="", replica=0, version=0, token_s=(), finished_s=1.0)


def began(load: list[ScheduledRequest], first_id: int = 0, continued: bool = False) -> Began:
    return Began(load=fingerprint(load), first_id=first_id, continued=continued)


def recovered(
    lines: list[Line],
    load: list[ScheduledRequest],
    relaunched: bool = True,
    committed: frozenset[int] = frozenset(),
    recorded: Recorded = Recorded(),  # noqa: B008 - frozen
) -> Recovery:
    return recover(add_up(lines), load, relaunched, committed, recorded)


def ids(load: tuple[ScheduledRequest, ...]) -> list[int]:
    return [s.request.id for s in load]


def test_the_first_start_has_all_before_it():
    found = recovered([], load_of(3), relaunched=False)
    assert ids(found.load) == [0, 1, 2] and not found.continued and not found.over and found.starts == 0


def test_a_restart_goes_on_where_the_load_was():
    load = load_of(5)
    lines = [
        began(load), Entered(phase="open"), accept(load[0]), accept(load[1]), end(0), Elapsed(load_s=1.7, run_s=9.0),
    ]  # fmt: skip
    found = recovered(lines, load)
    assert ids(found.load) == [2, 3, 4] and [a.request.id for a in found.open] == [1]
    assert (found.load_s, found.run_s, found.opened, found.continued) == (1.7, 9.0, True, True)


def test_the_load_goes_on_no_earlier_than_its_last_request():
    load = load_of(5)
    found = recovered([began(load), Elapsed(load_s=0.2, run_s=1.0), accept(load[3])], load)
    assert found.load_s == 3.0


def test_a_run_that_was_through_is_over_for_a_restart_and_a_new_one_for_a_person():
    load = load_of(2)
    lines = [began(load), accept(load[0]), end(0), accept(load[1]), end(1), Entered(phase="done")]
    over = recovered(lines, load, relaunched=True)
    assert over.over and not over.load and not over.open
    again = recovered(lines, load, relaunched=False)
    assert not again.over and not again.continued and not again.opened and again.load_s == 0.0
    assert ids(again.load) == [2, 3] and again.first_id == 2


def test_another_load_begins_anew_but_open_requests_are_answered():
    load, other = load_of(3), load_of(3, tokens=9)
    found = recovered([began(load), Entered(phase="open"), accept(load[0])], other, relaunched=False)
    assert ids(found.load) == [1, 2, 3] and [a.request.id for a in found.open] == [0]
    assert not found.opened and found.load_s == 0.0


def test_requests_of_a_folder_without_a_journal_keep_their_ids():
    found = recovered([], load_of(2), relaunched=False, recorded=Recorded(requests=frozenset({0, 1, 6})))
    assert ids(found.load) == [7, 8]


def test_an_end_without_a_row_gets_one_and_an_end_with_a_row_no_second():
    load = load_of(3)
    lines = [began(load), *map(accept, load), end(0), end(1)]
    found = recovered(lines, load, recorded=Recorded(requests=frozenset({0})))
    assert [e.id for _, e in found.unrecorded] == [1] and [a.request.id for a in found.open] == [2]


def test_a_request_with_a_row_is_not_answered_again_even_if_the_host_lost_its_line():
    load = load_of(2)
    found = recovered([began(load), accept(load[0])], load, recorded=Recorded(requests=frozenset({0, 1})))
    assert not found.open and not found.load


def stored(round_id: int, version: int) -> RoundStored:
    return RoundStored(round_id=round_id, version=version, heldout_loss=1.0, row={})


def test_rounds_count_once_and_only_if_their_adapter_became_current():
    load = load_of(1)
    lines = [
        began(load), RoundBegan(round_id=1), VersionGiven(version=1), stored(1, 1), RoundBegan(round_id=2),
        VersionGiven(version=2), stored(2, 2), RoundBegan(round_id=3), VersionGiven(version=3), stored(3, 3),
        RoundBegan(round_id=4),
    ]  # fmt: skip
    recorded = Recorded(rounds=frozenset({1}), versions=frozenset({1, 2}))
    found = recovered(lines, load, committed=frozenset({1, 2}), recorded=recorded)
    assert found.completed == 2 and (found.last_round, found.last_version) == (4, 3)
    assert [r.round_id for r in found.unrecorded_rounds] == [2] and not found.unrecorded_adapters
    anew = recovered([*lines, Entered(phase="done")], load, relaunched=False, committed=frozenset({1, 2}))
    assert anew.completed == 0 and (anew.last_round, anew.last_version) == (4, 3), "numbers are never given twice"


def test_after_a_deleted_journal_no_id_is_given_again_and_what_was_lost_is_known():
    """The tables of the killed process say what was submitted; the journal alone said what was open."""
    recorded = Recorded(
        requests=frozenset({0, 1}), offered=frozenset(range(5)), rounds=frozenset({3}), versions=frozenset({2})
    )
    found = recovered([], load_of(3), relaunched=False, recorded=recorded)
    assert ids(found.load) == [5, 6, 7] and found.lost == {2, 3, 4}
    assert (found.last_round, found.last_version) == (3, 2), "numbers of rounds and versions neither"


def test_nothing_is_called_lost_that_is_still_to_come_or_that_the_journal_knows():
    """A host lost power: the load offers again what the journal does not have, under the same id."""
    load = load_of(4)
    lines = [began(load), Entered(phase="open"), accept(load[0]), accept(load[1]), end(0)]
    found = recovered(lines, load, recorded=Recorded(offered=frozenset({0, 1, 2})))
    assert ids(found.load) == [2, 3] and not found.lost


@st.composite
def lives(draw: st.DrawFn) -> tuple[int, list[tuple[int, bool]]]:
    """(requests of the load, deaths as (lines that were written since the restart, row of the last end flushed))."""
    return draw(st.integers(0, 12)), draw(st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=6))


@given(lives())
def test_however_often_it_is_killed_every_request_is_offered_and_ended_exactly_once(life):
    """One process after the other offers and ends requests; each dies after some lines, and some rows die with it."""
    number, deaths = life
    load, lines, rows = load_of(number), [], []
    for budget, flushed in [*deaths, (10_000, True)]:
        found = recovered(lines, load, recorded=Recorded(requests=frozenset(rows)))
        rows += [e.id for _, e in found.unrecorded]
        work: list[Line] = [began(load, found.first_id, found.continued)]
        work += [end(a.request.id) for a in found.open]
        for scheduled in found.load:
            work += [accept(scheduled), end(scheduled.request.id)]
        done = work[:budget]
        lines += done
        ends = [line.id for line in done if isinstance(line, Ended)]
        rows += ends if flushed else ends[:-1]
    offered = [line.request.id for line in lines if isinstance(line, Accepted)]
    assert offered == list(range(number)), "each once, in order"
    assert sorted(rows) == list(range(number)), "each has exactly one row"


@given(st.lists(st.sampled_from([accept(s) for s in load_of(4)] + [end(i) for i in range(4)]), max_size=30))
def test_a_line_that_comes_twice_counts_once(lines):
    past = add_up([began(load_of(4)), *lines])
    once = add_up([began(load_of(4)), *dict.fromkeys(lines)])
    assert past == once


def test_open_requests_are_left_to_a_restart_only_if_one_is_coming():
    cases = {
        # restarts left, gathering, draining, lost
        (1, False, False, False): True,
        (1, False, False, True): True,
        (1, False, True, True): True,
        (1, True, False, False): True,
        (1, False, True, False): False,
        (0, False, False, True): False,
        (0, True, True, True): False,
    }
    for facts, expected in cases.items():
        assert hands_over(*facts) is expected, facts


def test_loads_differ_in_times_and_in_requests():
    prints = [fingerprint(load) for load in (load_of(2), load_of(3), load_of(2, tokens=5))]
    assert len(set(prints)) == 3 and all(a != b for a, b in pairwise(prints))
    assert fingerprint(load_of(2)) == prints[0]
