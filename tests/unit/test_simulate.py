"""Virtual time: events in order, a channel that loses nothing but what was sent to the dead, the same run each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from control_run import Run, make_config

from clif.metrics.writer import MetricsError
from clif.simulate.channel import SimChannel
from clif.simulate.memory import MemoryDisplay, MemorySink
from clif.simulate.virtual_time import VirtualTime
from clif.wire import messages as wire
from clif.wire.channels import RECEIVE_MESSAGES, decode_up


def test_events_happen_in_the_order_of_their_times_and_then_of_their_plans() -> None:
    time, seen = VirtualTime(), list[tuple[str, float]]()
    for name, at in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
        time.at(at, lambda name=name: seen.append((name, time())))  # type: ignore[misc]
    time.at(1.0, lambda: time.after(0.5, lambda: seen.append(("later", time()))))
    while time.advance(10.0):
        pass
    assert seen == [("a", 1.0), ("later", 1.5), ("b", 2.0), ("c", 2.0)] and time() == 10.0
    with pytest.raises(ValueError, match="planned for 9 s, and it is 10 s already"):
        time.at(9.0, lambda: None)


def pair(latency_s: float = 0.5) -> tuple[VirtualTime, SimChannel, list[wire.Down]]:
    time = VirtualTime()
    return time, SimChannel(time, latency_s), []


def test_waiting_takes_no_longer_than_until_the_first_message_or_the_timeout() -> None:
    time, channel, got = pair()
    line = channel.connect(0, got.append)
    assert list(channel.receive(2.0)) == [] and time() == 2.0
    line.send(wire.Goodbye(replica=0))
    assert list(channel.receive(0.25)) == [] and time() == 2.25
    ((sender, payload),) = channel.receive(60.0)
    assert (sender, decode_up(payload)) == (0, wire.Goodbye(replica=0)) and time() == 2.5


def test_messages_arrive_in_the_order_in_which_they_were_sent_and_a_turn_takes_a_bounded_number() -> None:
    _, channel, got = pair()
    line = channel.connect(3, got.append)
    for number in range(RECEIVE_MESSAGES + 5):
        line.send(wire.Settled(replica=3, round_id=0, version=0, step=number))
    received = [[decode_up(payload).step for _, payload in channel.receive(1.0)] for _ in range(3)]  # type: ignore[union-attr]
    assert [len(messages) for messages in received] == [RECEIVE_MESSAGES, 5, 0]
    assert received[0] + received[1] == list(range(RECEIVE_MESSAGES + 5))


def test_nothing_reaches_a_replica_that_is_gone_and_its_last_words_still_arrive() -> None:
    _, channel, got = pair()
    assert channel.send(0, wire.Ping()) is False, "it was never there"
    line = channel.connect(0, got.append)
    assert channel.send(0, wire.Ping())
    line.send(wire.Goodbye(replica=0))
    line.close()
    assert [sender for sender, _ in channel.receive(1.0)] == [0] and got == []
    assert channel.send(0, wire.Ping()) is False
    newer = list[wire.Down]()
    channel.connect(0, newer.append)
    line.close()
    assert channel.send(0, wire.Ping()) and list(channel.receive(1.0)) == []
    assert newer == [wire.Ping()], "the newest connection is the replica's"


def test_rows_in_memory_are_those_that_a_file_would_hold() -> None:
    time = VirtualTime(5.0)
    sink = MemorySink(time)
    time.advance(7.0)
    sink.row("transitions", replica=1, from_state="idle", to_state="failed", reason="é" * 300)
    (row,) = sink.rows["transitions"]
    assert (row["t"], row["replica"], row["to_state"]) == (2.0, 1, "failed") and len(row["reason"].encode()) <= 240
    with pytest.raises(MetricsError, match="unknown column colour"):
        sink.row("transitions", colour="red")


def test_a_display_in_memory_asks_for_snapshots_at_its_own_pace() -> None:
    display = MemoryDisplay(every_s=2.0)
    assert [display.due(now) for now in (1.9, 2.0)] == [False, True]
    assert not MemoryDisplay().due(1e9)


def test_the_same_run_twice_gives_the_same_records(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run = Run(make_config(tmp_path / name))
        run.leaders[0].fails_after = 3
        run.go()
        runs.append(run)
    one, two = runs
    assert repr(one.sink.rows) == repr(two.sink.rows), "NaN is NaN"
    assert one.journal.lines == two.journal.lines and one.time() == two.time()
    assert one.table("rounds") and {row["to_state"] for row in one.table("transitions")} >= {"failed", "combined"}
