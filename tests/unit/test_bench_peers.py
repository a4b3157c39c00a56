"""Contenders in other environments: they do the same work as CLIF in the same turns, and none stops the others."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from contenders import Work
from engine import Run, others, parse_streams, plan, suffix
from instances import Instances
from peer_process import PeerContender
from rival_engines import SERVING, Rival, parse, serving_contender, why_not
from turns import Limits, Outcome, Turn, race, settings_lines, split_table, table

from clif.errors import InputError

FAKE = str(Path(__file__).resolve().parents[1] / "fake_peer.py")
CORE = min(os.sched_getaffinity(0))
LIMITS = Limits((CORE,), 2 << 30, 60.0)
WORK = Work("none", "float32", requests=4, prompt=3, answer=2, adapters=("a", "b"))


def fake(name: str, work: Work = WORK, **job: Any) -> PeerContender:
    def inputs(turn: Turn) -> dict[str, Any]:
        return {"prompts": work.prompts(turn, 300), "adapters": work.versions(turn)}

    return PeerContender(name, sys.executable, FAKE, {"name": name, **job}, inputs)


def test_peers_take_turns_pinned_in_processes_of_their_own_and_get_the_work_of_each_turn(tmp_path):
    log = str(tmp_path / "log")
    found = [fake("a", tells=True, log=log), fake("b", tells=True, log=log)]
    race(found, 2, LIMITS, ((4,), (1, 1)))
    assert Path(log).read_text().split() == ["a", "b", "a", "b", "b", "a", "b", "a", "a", "b", "a", "b"]
    for one in found:
        assert not one.failed and one.peak_mib > 1
        assert one.settings == f"settings of {one.name}; Python {sys.version.split()[0]}"
        assert one.outcomes.keys() == {Turn(n, rows) for n in (1, 2) for rows in ((4,), (1, 1))}, "no warm-up"
        for turn, outcome in one.outcomes.items():
            asked = {"prompts": WORK.prompts(turn, 300), "adapters": WORK.versions(turn)}
            assert outcome.result[1:] == [[CORE], "1", asked]
    assert len({one.outcomes[Turn(1, (4,))].result[0] for one in found} | {os.getpid()}) == 3


def test_a_peer_that_breaks_dies_or_hangs_is_reported_and_stops_none_of_the_others():
    wrong = ("start", "breaking", "dying", "hanging")
    found = [fake("good"), *(fake(name, wrong=name) for name in wrong)]
    race(found, 1, Limits((CORE,), 2 << 30, 3.0), ((2,),))
    assert {one.name: one.failed for one in found} == {
        "good": "",
        "start": "ValueError: no such model",
        "breaking": "ValueError: out of luck",
        "dying": "ended with code 3: last words",
        "hanging": "no answer within 3 s",
    }
    lines = table("t", 1, found, lambda a, b: f"{a == b}", (2,))
    assert any(line.startswith("| dying | | | ended with code 3") for line in lines)
    assert len(found[0].seconds((2,))) == 1


def wait_until_stopped(process: psutil.Process) -> None:
    """The kernel stops a process once it is scheduled."""
    deadline = time.monotonic() + 20
    while process.status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline, "it computes while others have their turn"
        time.sleep(0.01)


def test_a_peer_rests_stopped_until_its_turn_and_is_gone_at_the_end():
    one = fake("one")
    one.start(LIMITS)
    process = psutil.Process(one.process.pid)
    wait_until_stopped(process)
    one.take_turn(Turn(1, (2,)))
    wait_until_stopped(process)
    assert one.first_result((2,)) == WORK.prompts(Turn(1, (2,)), 300)
    one.stop()
    assert not process.is_running()


def test_instances_share_the_cores_and_the_requests_of_a_turn():
    cores = (CORE, max(os.sched_getaffinity(0)))
    work = Work("none", "float32", requests=5, prompt=3, answer=2, instances=2)
    parts = [Work(**{**vars(work), "instance": i}) for i in range(2)]
    pair = Instances("pair", [fake(f"part{i}", part, tells=True) for i, part in enumerate(parts)])
    race([pair], 1, Limits(cores, 2 << 30, 60.0), ((5,),))
    assert not pair.failed and len(pair.seconds((5,))) == 1
    # Each member's result is [process, cores, threads, message].
    first, second = pair.first_result((5,))[:4], pair.first_result((5,))[4:]
    assert (first[1], second[1]) == ([cores[0]], [cores[1]]) and first[0] != second[0]
    prompts = [message["prompts"] for message in (first[3], second[3])]
    assert [len(one) for one in prompts] == [3, 2]
    whole = {tuple(ids) for ids in Work("none", "float32", prompt=3).prompts(Turn(1, (5,)), 300)}
    assert {tuple(ids) for part in prompts for ids in part} == whole


def test_instances_fail_with_the_first_of_them():
    pair = Instances("pair", [fake("good"), fake("bad", wrong="breaking")])
    cores = (CORE, max(os.sched_getaffinity(0)))
    race([pair], 1, Limits(cores, 2 << 30, 60.0), ((2,),))
    assert pair.failed == "ValueError: out of luck"


def test_rows_of_versions_are_mixed_and_the_same_for_all_contenders():
    turn = Turn(3, (48, 16))
    versions = WORK.versions(turn)
    assert [versions.count(i) for i in (0, 1)] == [48, 16] and versions != sorted(versions)
    assert versions == WORK.versions(turn) and len(WORK.prompts(turn, 300)) == 64
    assert Work("none", "float32").versions(Turn(1, (4,))) == [-1] * 4
    other = WORK.prompts(Turn(3, (64,)), 300)
    assert not {tuple(ids) for ids in other} & {tuple(ids) for ids in WORK.prompts(turn, 300)}


def test_the_table_of_versions_compares_within_repeats():
    one = fake("one")
    one.outcomes = {Turn(1, (4,)): Outcome(1.0, 0), Turn(2, (4,)): Outcome(2.0, 0)}
    one.outcomes |= {Turn(1, (3, 1)): Outcome(2.0, 0), Turn(2, (3, 1)): Outcome(2.0, 0)}
    lines = split_table(100, [one], 4, (3, 1))
    assert "| one | 75 (50 to 100) | 50 (50 to 50) | 0.750 (0.500 to 1.000) |" in lines


def test_streams_and_peers_are_read_from_the_command_line():
    assert parse_streams("32,8,48+16") == ((32,), (8,), (48, 16))
    assert parse(["vllm=/x/python", "llama=/y"]) == {"vllm": "/x/python", "llama": "/y"}
    for given in ("vllm", "vllm=", "nobody_knows=/x"):
        with pytest.raises(InputError, match="give NAME=PATH, where NAME is one of openvino, vllm"):
            parse([given])
    for given in ("many", "4,0"):
        with pytest.raises(InputError, match="give whole numbers"):
            parse_streams(given)
    with pytest.raises(InputError, match="give an adapter for each number of a sum"):
        plan(WORK, "4,2+2", 1, 1, (), Path("none"))
    with pytest.raises(InputError, match="for it"):
        plan(WORK, "4", 1, 1, (), Path("none"))
    assert suffix(Run(Work(**{**vars(WORK), "instances": 2}), (), {}, None), "serving") == (
        "-serving-2-adapters-2-instances"
    )


def test_what_is_not_found_is_left_out_with_the_reason():
    vllm = SERVING["vllm"]
    assert why_not(vllm, "/nowhere/python").startswith("/nowhere/python: ")
    assert why_not(Rival("x", "x.py", "no_such_module"), "") == "no_such_module is not installed in this environment"
    assert why_not(Rival("x", "x.py", "no_such_module"), sys.executable).endswith(f"in {sys.executable}")
    assert why_not(Rival("x", "x.py", "json"), "") == ""
    assert why_not(SERVING["llama"], "") == "no program given"
    assert why_not(SERVING["llama"], "/nowhere") == "no file /nowhere"
    rivals = {"llama": SERVING["llama"], "openvino": Rival("OpenVINO", "x.py", "json", 1)}
    found, lines = others(Run(WORK, ((4,),), {}, None), rivals, serving_contender)
    assert not found and lines == [
        "* llama.cpp server is left out: no program given",
        "* OpenVINO is left out: it serves 1 adapters at once at most",
    ]


def test_every_driver_is_there_and_needs_nothing_of_clif():
    drivers = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
    for path in drivers.glob("*.py"):
        assert "clif" not in [word.split(".")[0] for word in path.read_text().split()], path.name
    assert {rival.driver for rival in SERVING.values()} <= {path.name for path in drivers.glob("*.py")}
    assert settings_lines([fake("silent")]) == [""]
