"""Cost of a dispatch in the control process by number of replicas: hand-over, view and decision, with real classes.

python benchmarks/dispatch.py [--replicas 2 100 1000] [--requests 2000]
"""

from __future__ import annotations

import argparse
import statistics
import time

import checkout  # noqa: F401

from clif.config import Config, config_from_tree
from clif.control.dispatcher import Dispatcher, Hooks
from clif.control.fleet import Fleet
from clif.types import FinishReason, Request, Sampling, TokenEvent
from clif.wire.messages import Hello


def cluster(config: Config, replicas: int) -> tuple[Dispatcher, Fleet]:
    dispatcher = Dispatcher(config, lambda *_: True, Hooks(finished=lambda _: None, dispatched=lambda *_: None))
    fleet = Fleet(config, replicas, lambda *_: True, dispatcher.held, lambda *_: None)
    for number in range(replicas):
        hello = Hello(
            replica=number, rank=number, host="h", pid=1, max_batch=16, kv_tokens=65536, max_context=4096,
            vocabulary=32000, adapter="", heldout_rows=0, dtype="bfloat16", load_s=0.0,
        )  # fmt: skip
        fleet.join(0.0, hello)
    return dispatcher, fleet


def dispatch_us(config: Config, replicas: int, requests: int) -> list[float]:
    """Microseconds of each dispatch; half of the replicas' capacity is taken all the time."""
    dispatcher, fleet = cluster(config, replicas)
    held: list[int] = []
    found = []
    for number in range(requests + replicas * 8):
        dispatcher.submit(0.0, Request(id=number, prompt=(1,) * 200, sampling=Sampling(max_tokens=100)))
        start = time.perf_counter()
        dispatcher.dispatch(0.0, fleet.routing_view)
        found.append(1e6 * (time.perf_counter() - start))
        held.append(number)
        if len(held) > replicas * 8:
            ended = held.pop(0)
            for replica in range(replicas):
                if dispatcher.held_by(replica, ended):
                    event = TokenEvent(request_id=ended, tokens=(5,), finish=FinishReason.STOP)
                    dispatcher.on_event(0.0, replica, event)
                    break
    return found[-requests:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 100, 1000])
    parser.add_argument("--requests", type=int, default=2000)
    asked = parser.parse_args()
    config = config_from_tree({"model": {"path": "m"}, "data": {"path": __file__}})
    print("| replicas | median, us | 90 % within, us |\n|---|---|---|")
    for replicas in asked.replicas:
        found = sorted(dispatch_us(config, replicas, asked.requests))
        print(f"| {replicas} | {statistics.median(found):.0f} | {found[int(0.9 * len(found))]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
