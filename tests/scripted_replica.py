"""A replica by script: it answers, trains, fails and falls silent as a test asks, in virtual time or over a socket."""

import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

import numpy as np
import safetensors.numpy
import tokenizers

from clif.adapters.peft_files import PREFIX, describe
from clif.simulate.channel import SimChannel
from clif.simulate.virtual_time import VirtualTime
from clif.tokenizer import ChatTokenizer
from clif.types import CLIF, FinishReason, HeldoutLoss, Request, RoundPlan, RoundResult, TokenEvent, Vote
from clif.wire import messages as wire
from clif.wire.channels import LeaderChannel, decode_down
from clif.wire.keys import Keys

ANSWER = "yes please"
HELDOUT_TOKENS = 10
KEYS = Keys(b"0123456789abcdef" * 2)
SHAPES = {"layer.lora_A.weight": (8, 4), "layer.lora_B.weight": (4, 8)}
ADAPTER_JSON = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16.0})
STEP_S, REPORT_S = 0.005, 0.02


def adapter_bytes(value: float = 0.5) -> bytes:
    """A whole adapter in PEFT's naming."""
    return safetensors.numpy.save({PREFIX + name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()})


def make_tokenizer() -> ChatTokenizer:
    words = {w: i for i, w in enumerate(["</s>", "<unk>", "ask", "no", *ANSWER.split(), "now"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    return ChatTokenizer(tokenizer, None, [0])


class ScriptedReplica:
    """Answers one token per step, and knows the right answer from version 1 on.

    Its driver gives it `send` and calls start(), take() for each message, and step(now) every STEP_S until it is over.
    silent_after, fails_after: after so many requests it hangs (and wakes up 1.5 s later if it `wakes`), or meets an
    error and is rebuilt in fails_for_s. gone: it has done so. serves: whether it answers at present.
    holds_after: rounds after so many are not trained. slow_installs_s: how long it takes to take in a version that does
    not become active. lies: it answers with its active version whatever is asked for.
    """

    def __init__(self, replica: int, silent_after: int | None = None) -> None:
        self.replica = replica
        self.send: Callable[[wire.Up], None] = lambda _: None
        self.send_bytes: Callable[[bytes], None] = lambda _: None
        self.silent_after = silent_after
        self.fails_after: int | None = None
        self.fails_for_s = 0.2
        self.wakes = False
        self.incarnation = 0
        self.version = 0
        self.loaded: set[int] = set()
        self.wanted: set[int] = set()
        self.most_held = 0
        self.orders: Counter[str] = Counter()
        self.holds_after: int | None = None
        self.slow_installs_s = 0.0
        self.lies = False
        self.busy = 0.1
        self.gone = False
        self.serves: Callable[[], bool] = lambda: True
        self.installed: list[int] = []
        self.running: dict[int, tuple[Request, int, int]] = {}
        self.plan: RoundPlan | None = None
        self.plans: list[RoundPlan] = []
        self.trains_until_told = False
        self.candidate_loss = 1.0
        self.serve_timings: tuple[tuple[float, float, float], ...] = ((1.0, 0.0, 0.01),)
        self.submitted = 0
        self.tokenizer = make_tokenizer()
        self.over = False
        self.exit_code: int | None = None
        self._waiting: deque[wire.Down] = deque()
        self._installs: deque[tuple[float, wire.Install]] = deque()
        self._asleep_until, self._reported, self._now = 0.0, 0.0, 0.0
        self._returning, self._welcome = False, True

    def start(self) -> None:
        self.send(self.hello())

    def take(self, message: wire.Down) -> None:
        """A message has arrived; it is read in the next turn."""
        self._waiting.append(message)

    def step(self, now: float) -> None:
        self._now = now
        if not self._awake():
            return
        if self._returning:
            self._returning = self._welcome = False
            self.send(self.hello())
        while self._waiting and self._awake():
            self._read(self._waiting.popleft())
        if self._awake() and self._welcome:
            self._install()
            self._act()

    def rebuild(self, error: str) -> None:
        self.send(wire.Trouble(replica=self.replica, error=error, returning=True))
        self.incarnation, self.running, self.plan = self.incarnation + 1, {}, None
        self.loaded, self.wanted = {self.version} - {0}, set()
        self._asleep_until, self._returning = self._now + self.fails_for_s, True

    def _awake(self) -> bool:
        return not self.over and self._now >= self._asleep_until

    def _read(self, message: wire.Down) -> None:
        """As a replica does: what was sent before Welcome is not meant for this incarnation."""
        if self._welcome or isinstance(message, wire.Stop):
            self.obey(message)
        else:
            self._welcome = message == wire.Welcome(incarnation=self.incarnation)

    def _act(self) -> None:
        if self.silent_after is not None and self.submitted >= self.silent_after:
            self.silent_after = None
            self.serve()
            self.gone, self._asleep_until = True, self._now + 1.5 if self.wakes else math.inf
        elif self.fails_after is not None and self.submitted >= self.fails_after:
            self.fails_after = None
            self.serve()
            self.gone = True
            self.rebuild("RuntimeError: out of memory")
        else:
            if self.serves():
                self.serve()
            if self._now - self._reported > REPORT_S:
                self._reported = self._now
                self.send(self.report())

    def hello(self) -> wire.Hello:
        return wire.Hello(
            replica=self.replica, rank=self.replica, host="h", pid=1, max_batch=4, kv_tokens=8192,
            max_context=2048, vocabulary=8, adapter=describe(SHAPES),
            heldout_rows=1, dtype="float32", load_s=0.0, incarnation=self.incarnation, version=self.version,
            versions=self.held,
        )  # fmt: skip

    def report(self) -> wire.Report:
        return wire.Report(
            replica=self.replica, running=len(self.running), waiting=0, kv_used=0, busy=self.busy,
            version=self.version, training_steps=0, last_loss=1.0, serve_timings=self.serve_timings,
            train_timings=((4.0, 1.0, 0.1),),
        )  # fmt: skip

    def serve(self) -> None:
        events = []
        for number, (request, version, count) in list(self.running.items()):
            answer = self.tokenizer.encode_answer(ANSWER if version else "no")
            last = count + 1 == min(len(answer), request.sampling.max_tokens)
            finish = FinishReason.STOP if last else None
            events.append(TokenEvent(request_id=number, tokens=(answer[count],), version=version, finish=finish))
            if last:
                del self.running[number]
            else:
                self.running[number] = (request, version, count + 1)
        if events:
            self.send(wire.Tokens(replica=self.replica, events=tuple(events)))

    def obey(self, message: wire.Down) -> None:
        me = self.replica
        self.orders[type(message).__name__] += 1
        if isinstance(message, wire.Submit):
            self.submitted += 1
            pinned = message.request.version
            version = pinned if pinned is not None else self.version if message.version is None else message.version
            version = self.version if self.lies else version
            self.running[message.request.id] = (message.request, version, len(message.output_ids))
        elif isinstance(message, wire.Cancel):
            self.running.pop(message.request_id, None)
        elif isinstance(message, wire.BeginRound):
            self.plan = message.plan
            self.plans.append(message.plan)
            held_up = self.holds_after is not None and len(self.plans) > self.holds_after
            if not self.trains_until_told and not held_up:
                self.steps_done(message.plan.round_id)
        elif isinstance(message, wire.FinishSteps):
            self.steps_done(message.round_id)
        elif isinstance(message, wire.Aggregate):
            vote = Vote(
                round_id=message.round_id, replica=me, finite=True,
                candidate_loss=self.candidate_loss, active_loss=20.0,
                tokens=HELDOUT_TOKENS, error2=0.01, product2=1.0,
            )  # fmt: skip
            self.send(wire.Voted(vote=vote))
        elif isinstance(message, wire.Settle):
            self.settle(message)
        elif isinstance(message, wire.Install):
            slow = 0.0 if message.activate else self.slow_installs_s
            self._installs.append((self._now + slow, message))
            self._install()
        elif isinstance(message, wire.Keep):
            self.wanted = set(message.versions)
            self.tell_held()
        elif isinstance(message, wire.Activate):
            assert message.version in (0, *self.held)
            self.version = message.version
            self.send(wire.Settled(replica=me, round_id=0, version=self.version, step=1))
            self.tell_held()
        elif isinstance(message, wire.Evaluate):
            loss = 1.0 if self.version else 20.0
            result = HeldoutLoss(replica=me, version=self.version, loss=loss, tokens=HELDOUT_TOKENS)
            self.send(wire.Evaluated(result=result))
        elif isinstance(message, wire.Rebuild):
            self.rebuild(message.reason)
        elif isinstance(message, wire.Stop):
            self.exit_code = message.code
            self.send(wire.Goodbye(replica=me))
            self.over = True

    def steps_done(self, round_id: int) -> None:
        done = RoundResult(
            round_id=round_id, replica=self.replica, samples=8, tokens=80, targets=40, steps=2, loss=1.0,
            finite=True, noise_scale=1e6,
        )  # fmt: skip
        self.send(wire.StepsDone(result=done))

    def settle(self, message: wire.Settle) -> None:
        if message.commit and self.plan is not None and self.plan.adapter != CLIF:
            self.wanted |= {message.version}
            self.loaded |= {message.version}
        elif message.commit:
            self.version = message.version
            self.loaded |= {message.version}
        if message.publish:
            published = wire.Published(
                replica=self.replica, version=message.version, round_id=message.round_id, config_json=ADAPTER_JSON,
                weights=adapter_bytes(),
            )  # fmt: skip
            self.send(published)
        version = message.version if message.commit else self.version
        self.send(wire.Settled(replica=self.replica, round_id=message.round_id, version=version, step=1))
        self.tell_held()

    @property
    def held(self) -> tuple[int, ...]:
        return tuple(sorted(self.loaded & ({self.version} | self.wanted)))

    def _install(self) -> None:
        while self._installs and self._installs[0][0] <= self._now:
            message = self._installs.popleft()[1]
            if message.activate:
                self.version = message.version
            elif message.version not in self.wanted:
                continue
            self.installed.append(message.version)
            self.loaded |= {message.version}
            if message.activate:
                self.send(wire.Settled(replica=self.replica, round_id=0, version=message.version, step=1))
            self.tell_held()

    def go_on(self) -> None:
        """Rounds are trained from now on, the one under way as well."""
        self.holds_after = None
        if self.plan is not None:
            self.steps_done(self.plan.round_id)

    def tell_held(self) -> None:
        self.loaded = set(self.held)
        self.most_held = max(self.most_held, len(self.loaded))
        self.send(wire.Held(replica=self.replica, versions=self.held))


def drive(script: ScriptedReplica, clock: VirtualTime, channel: SimChannel) -> None:
    """Plan the turns of a replica in virtual time, from now until it is over."""
    line = channel.connect(script.replica, script.take)
    script.send, script.send_bytes = line.send, line.send_bytes

    def step() -> None:
        script.step(clock())
        if not script.over:
            clock.after(STEP_S, step)

    script.start()
    clock.after(STEP_S, step)


class SocketReplica(threading.Thread):
    """Drives a replica over ZeroMQ, in real time."""

    def __init__(self, script: ScriptedReplica, address: str) -> None:
        super().__init__(daemon=True)
        self.script, self.address = script, address
        self.end = threading.Event()

    def run(self) -> None:
        channel = LeaderChannel(self.address, KEYS, self.script.replica)
        self.script.send = channel.send
        self.script.start()
        while not self.script.over and not self.end.is_set():
            self._receive(channel, 0.002)
            self.script.step(time.monotonic())
        if not self.script.over:
            # The server may have gone before its last word was read.
            self._receive(channel, 1.0)
            self.script.step(time.monotonic())
        channel.close()

    def _receive(self, channel: LeaderChannel, timeout_s: float) -> None:
        for payload in channel.receive(timeout_s):
            self.script.take(decode_down(payload))
