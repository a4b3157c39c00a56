"""A run with an emulated engine that notes when each request came to it and when it sent which tokens.

    python benchmarks/stamped_engine.py STAMPS section.key=value ...

STAMPS is written at the end: MessagePack of {"submitted": {seed: s}, "sent": {seed: [s, ...]}}, by the seed of each
request, one stamp for each token, on time.monotonic, which all processes of a host share.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import checkout  # noqa: F401
import msgspec

from clif.config import load_config
from clif.config.shipped import find_config
from clif.distributed.layout import make_layout
from clif.emulated.replica import Watch
from clif.emulated.start import run_emulated
from clif.types import Request, TokenEvent


class Stamps(Watch):
    """Notes as little as possible while the run lasts."""

    def __init__(self) -> None:
        self._submitted: dict[int, float] = {}
        self._seeds: dict[int, int | None] = {}
        self._sent: list[tuple[float, Sequence[TokenEvent]]] = []

    def submitted(self, now: float, request: Request) -> None:
        self._submitted[request.id], self._seeds[request.id] = now, request.sampling.seed

    def sent(self, now: float, events: Sequence[TokenEvent]) -> None:
        self._sent.append((now, events))

    def encoded(self) -> bytes:
        sent: dict[int, list[float]] = defaultdict(list)
        for now, events in self._sent:
            for event in events:
                seed = self._seeds[event.request_id]
                if seed is not None:
                    sent[seed] += [now] * len(event.tokens)
        submitted = {seed: self._submitted[id] for id, seed in self._seeds.items() if seed is not None}
        return msgspec.msgpack.encode({"submitted": submitted, "sent": sent})


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = load_config(find_config("serve"), tuple(sys.argv[2:]))
    stamps = Stamps()
    code = run_emulated(config, make_layout(1), stamps)
    Path(sys.argv[1]).write_bytes(stamps.encoded())
    return code


if __name__ == "__main__":
    sys.exit(main())
