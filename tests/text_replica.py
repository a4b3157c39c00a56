"""A replica that answers with texts that a test can foretell, over a socket and in real time."""

import functools
import threading
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace
from scripted_replica import KEYS

from clif.adapters.peft_files import describe
from clif.config import Config
from clif.emulated.member import shapes
from clif.emulated.replica import EmulatedReplica, EmulatedSupervisor
from clif.emulated.step_times import FixedTimes
from clif.engine.scheduler import Chunk
from clif.models.bytes_tokenizer import byte_tokenizer
from clif.replica.records import RankRecords
from clif.tokenizer import ChatTokenizer
from clif.types import Request, TokenEvent, TokenLogprob
from clif.wire import messages as wire
from clif.wire.channels import LeaderChannel

STEP_S, POLL_S = 0.001, 0.005
LIKELIEST, NEXT = -0.25, -1.5
TEXT = "Ünï çödé 🙂 texts are cut into bytes, and every byte is a token. "


@functools.cache
def tokenizer() -> ChatTokenizer:
    """A token for each byte, and one that ends an answer."""
    return byte_tokenizer(512)


def answer_to(request: Request) -> str:
    """The whole answer: a greedy one depends on the prompt, another one on the seed, and without it on the request."""
    sampling = request.sampling
    chosen = (
        sum(request.prompt) if sampling.temperature == 0 else request.id if sampling.seed is None else sampling.seed
    )
    return f"{chosen % 1000}: {TEXT}"


class TextReplica(EmulatedReplica):
    """Its scheduler is the real one, so that ends, stop strings, cancellations and blocks are, too.

    serves: whether it begins steps at present.
    """

    serves: Callable[[], bool] = staticmethod(lambda: True)

    def _settle(self, flight: Any) -> None:
        by_id = {chunk.sequence.request.id: chunk.sequence.request for chunk in flight.chunks}
        send, self._send = self._send, lambda message: send(with_logprobs(message, by_id))
        try:
            super()._settle(flight)
        finally:
            self._send = send

    def _begin(self) -> None:
        if self.serves():
            super()._begin()
        else:
            self._flight = None

    def _next(self, chunk: Chunk) -> int:
        request = chunk.sequence.request
        answer = tokenizer().encode_answer(answer_to(request))
        at = chunk.stop - len(request.prompt)
        return answer[at % (len(answer) - 1) if request.sampling.ignore_eos else at]


def with_logprobs(message: wire.Up, requests: dict[int, Request]) -> wire.Up:
    if not isinstance(message, wire.Tokens):
        return message
    events = tuple(_with_logprobs(event, requests[event.request_id]) for event in message.events)
    return replace(message, events=events)


def _with_logprobs(event: TokenEvent, request: Request) -> TokenEvent:
    many = request.sampling.logprobs
    if many is None:
        return event
    found = [
        TokenLogprob(t, LIKELIEST, ((t, LIKELIEST), *((65 + i, NEXT - i) for i in range(20)))[:many])
        for t in event.tokens
    ]
    return replace(event, logprobs=tuple(found))


class TextReplicaThread(threading.Thread):
    """A replica from its first Hello to Stop. replica: its present incarnation."""

    def __init__(self, config: Config, number: int, address: str) -> None:
        super().__init__(daemon=True, name=f"replica {number}")
        self._config, self._number, self._address = config, number, address
        self.end = threading.Event()
        self.replica: TextReplica | None = None

    def run(self) -> None:
        channel = LeaderChannel(self._address, KEYS, self._number)
        records = RankRecords(self._config.run_dir, self._number, self._config.metrics, {})
        parts = FixedTimes(STEP_S), tokenizer(), records

        def build(steps: int) -> EmulatedReplica:
            self.replica = TextReplica(self._config, self._number, *parts, channel.send, steps=steps)
            return self.replica

        supervisor = EmulatedSupervisor(build, lambda built, incarnation: channel.send(self._hello(built, incarnation)))
        while not supervisor.replica.stopping and not self.end.is_set():
            supervisor.step(channel.receive(self._wait_s(supervisor)))
        channel.send(wire.Goodbye(replica=self._number))
        records.close()
        channel.close()

    def _wait_s(self, supervisor: EmulatedSupervisor) -> float:
        """It looks whether it may serve again, and whether the test is over."""
        assert self.replica is not None
        return min(supervisor.replica.wait_s(), POLL_S) if self.replica.serves() else POLL_S

    def _hello(self, built: EmulatedReplica, incarnation: int) -> wire.Hello:
        config, slots = self._config, built.scheduler.slots
        return wire.Hello(
            replica=self._number, rank=self._number, host="h", pid=1, max_batch=config.engine.max_batch,
            kv_tokens=config.kv_tokens_bound, max_context=config.model.max_context, vocabulary=257,
            adapter=describe(shapes(config.adapter)), heldout_rows=int(config.train.enabled), dtype="float32",
            load_s=0.0, incarnation=incarnation, version=slots.active, versions=slots.held,
        )  # fmt: skip
