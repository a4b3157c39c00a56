"""The engine's benchmark: all contenders do the same work in every repeat, none sees another, none stops the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import turn_bodies
from contenders import Work, clif_serving, clif_training, peft_training, static_batch
from turns import Contender, Limits, Outcome, OwnContender, Ready, Turn, race, settings_lines, table

REPO = Path(__file__).resolve().parents[2]
CORE = min(os.sched_getaffinity(0))
LIMITS = Limits((CORE,), 2 << 30, 120.0)


def contenders(**bodies: tuple[Any, ...]) -> list[Contender]:
    return [
        OwnContender(name, getattr(turn_bodies, name.split("_")[0]), arguments) for name, arguments in bodies.items()
    ]


def test_contenders_take_turns_forwards_and_backwards_in_processes_of_their_own(tmp_path):
    log = str(tmp_path / "log")
    found = contenders(recording_a=(log, "a"), recording_b=(log, "b"))
    before = dict(os.environ)
    race(found, 2, LIMITS)
    assert Path(log).read_text().split() == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert dict(os.environ) == before
    for one in found:
        assert not one.failed and len(one.seconds()) == 2 and one.peak_mib > 1
        results = [outcome.result for outcome in one.outcomes.values()]
        assert [result[1:] for result in results] == [(1, "1", [CORE]), (2, "1", [CORE])], "the warm-up is left out"
    processes = [{outcome.result[0] for outcome in one.outcomes.values()} for one in found]
    assert len(processes[0] | processes[1]) == 2 and os.getpid() not in processes[0] | processes[1]


def test_a_contender_that_breaks_dies_or_wants_too_much_is_reported_and_stops_nobody(tmp_path):
    log = str(tmp_path / "log")
    found = contenders(recording=(log, "a"), breaking=(), dying=(), greedy=())
    race(found, 2, LIMITS)
    said = {one.name: one.failed for one in found}
    assert said == {
        "recording": "",
        "breaking": "ValueError: out of luck",
        "dying": "ended with code 3",
        "greedy": "MemoryError: ",
    }
    assert Path(log).read_text().split() == ["a0", "a1", "a2"]
    assert "| breaking | | | ValueError: out of luck |" in "\n".join(table("t", 1, found, lambda a, b: "")).strip()


def test_a_contender_that_hangs_is_ended():
    (found,) = contenders(hanging=())
    race([found], 2, Limits((CORE,), 2 << 30, 0.5))
    assert found.failed == "no answer within 0.5 s" and not found.process.is_alive()


def test_the_table_has_ratios_of_each_repeat_with_their_spread():
    ours, theirs = (OwnContender(name, turn_bodies.breaking, ()) for name in ("ours", "theirs"))
    ours.settings = "none"
    for one, seconds in ((ours, (1.0, 2.0, 4.0)), (theirs, (2.0, 2.0, 4.4))):
        one.outcomes = {Turn(number): Outcome(s, 7) for number, s in enumerate(seconds, 1)}
    lines = table("Race", 100, [ours, theirs], lambda a, b: f"{a} and {b}")
    assert "| ours | 50 (25 to 100) | 1.00 (1.00 to 1.00) | 7 and 7 | 0 |" in lines
    assert "| theirs | 50 (23 to 50) | 1.10 (1.00 to 2.00) | 7 and 7 | 0 |" in lines
    assert settings_lines([ours, theirs]) == ["* ours: none", ""]


@pytest.fixture(scope="module")
def work(tiny_config) -> Work:
    serving = {"requests": 3, "prompt": 20, "answer": 5}
    return Work(f"random:{tiny_config}", "float32", **serving, steps=2, samples=2, length=16, targets=8)


def test_every_repeat_has_new_prompts_and_samples_and_all_contenders_have_the_same(work):
    repeats = [work.prompts(Turn(n, (3,)), 300) for n in range(4)]
    beginnings = {tuple(ids[:8]) for prompts in repeats for ids in prompts}
    assert len(beginnings) == 4 * work.requests, "half a block in common could be reused"
    assert work.prompts(Turn(2, (3,)), 300) == repeats[2]
    assert {len(ids) for prompts in repeats for ids in prompts} == {work.prompt}
    samples = [[s.ids for step in work.training(Turn(n), 300) for s in step] for n in range(4)]
    assert len({ids for found in samples for ids in found}) == 4 * work.steps * work.samples


def turns_of(ready: Ready, repeats: int = 2, rows: tuple[int, ...] = (3,)) -> list[Any]:
    return [ready.turn(Turn(number, rows))() for number in range(repeats)]


def test_clif_computes_every_prompt_as_its_rival_does(work):
    assert turns_of(clif_serving(work)) == turns_of(static_batch(work))


def test_prompts_that_come_again_are_found_out(work, monkeypatch):
    """With prefix reuse on, the default, a repeat of the same prompts would compute a part of them only."""
    same = work.prompts(Turn(0, (3,)), 300)
    monkeypatch.setattr(Work, "prompts", lambda self, turn, vocab: same)
    ready = clif_serving(work)
    ready.turn(Turn(0, (3,)))()
    with pytest.raises(AssertionError, match="CLIF left out prompt tokens that the others compute"):
        ready.turn(Turn(1, (3,)))()


def test_clif_and_peft_learn_from_the_same_samples(work):
    """Adapters begin as nothing, so the first loss is the model's own; later ones differ with A's random numbers."""
    single = Work(**{**vars(work), "steps": 1})
    ours, theirs = turns_of(clif_training(single), 3), turns_of(peft_training(single), 3)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours == pytest.approx(theirs, rel=0.02)
