"""A rank that is told to leave does so: in good order if it can, and in any case."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from clif.rank.serve_loop import ALONE_S, serve_until_stop
from clif.wire import messages as m
from clif.wire.channels import ControlChannel, LeaderChannel, decode_down
from clif.wire.keys import Keys

RANK = """
import sys, threading, time
from clif.rank import signals
signals.LATE_S = signals.HANGS_S = 0.1
told = signals.SignalWatcher(drain_s=0.2)
told.on_signal = lambda name: print("passed on", name, flush=True)
told.serving = sys.argv[1] != "loading"
print("ready", flush=True)
if sys.argv[1] == "serves":
    while not told.late:
        time.sleep(0.01)
    print("left by itself after", told.signal, flush=True)
else:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("state", "code", "said"),
    [
        ("loading", 143, "passed on {name}\n"),
        ("hangs", 143, "passed on {name}\n"),
        ("serves", 0, "passed on {name}\nleft by itself after {name}\n"),
    ],
)
def test_a_signalled_rank_passes_the_signal_on_and_leaves(state, code, said, number):
    with subprocess.Popen([sys.executable, "-P", "-c", RANK, state], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, said.format(name=number.name))


def test_a_leader_knows_when_the_control_process_is_gone():
    keys = Keys(b"k" * 32)
    control = ControlChannel(keys, 1)
    leader = LeaderChannel(control.address, keys, 0)
    leader.send(m.Goodbye(replica=0))
    end = time.monotonic() + 30
    while not list(control.receive(0.1)):
        assert time.monotonic() < end
    assert leader.lost_s is None
    assert control.send(0, m.Ping()) and [decode_down(x) for x in leader.receive(30.0)] == [m.Ping()]
    control.close()
    while leader.lost_s is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    leader.send(m.Goodbye(replica=0))
    leader.close()


def test_a_leader_that_no_control_process_speaks_to_does_not_stay_for_ever():
    """deepspeed leaves the ranks of other hosts alone when rank 0's is gone."""
    steps: list[None] = []

    def step(payloads: list[bytes]) -> None:
        steps.append(None)
        broken.lost_s = 2 * ALONE_S

    broken = SimpleNamespace(lost_s=0.0, receive=lambda timeout_s: [])
    supervisor = SimpleNamespace(replica=SimpleNamespace(stopping=False, wait_s=lambda: 0.0), step=step)
    with pytest.raises(RuntimeError, match="no connection to the control process for 60 s"):
        serve_until_stop(supervisor, broken, None, SimpleNamespace(signal="", serving=False))
    assert len(steps) == 1
