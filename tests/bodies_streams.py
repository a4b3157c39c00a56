"""What a rank does in the tests of two streams: a replica's whole life on streams that are checked."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from bodies import Driver, serve_alone
from helpers import answer, request
from stream_check import SERVING, TRAINING, CheckedStreams, StreamRules

import clif.engine.build as build
from clif.distributed.topology import Topology
from clif.engine.jobs import Job
from clif.engine.runner import ModelRunner
from clif.engine.sampling import SampledTokens
from clif.engine.stopwatch import HostTiming
from clif.engine.train_stream import TrainStream
from clif.replica.replica import CountedLost
from clif.wire import messages as m

LOOKS = 4
"""How often the host asks before the device has done a slice."""


class Watched:
    """Patches what gives work to the device, so that its stream is known."""

    def __init__(self, streams: CheckedStreams) -> None:
        self.streams, self.wrong, self.counts = streams, list[str](), {"job": 0, "step": 0, "beside": 0}

    def __enter__(self) -> Watched:
        streams, sent = self.streams, dict[int, int]()
        send, read, forward = SampledTokens.send, SampledTokens.read, ModelRunner.forward
        self._patches = []

        def watched_send(tokens: SampledTokens, *rest: Any) -> None:
            send(tokens, *rest)
            sent[id(tokens)] = streams.launched[SERVING]

        def watched_read(tokens: SampledTokens) -> list[int]:
            streams.host_waited(SERVING, sent.pop(id(tokens)))
            return read(tokens)

        def watched_forward(runner: ModelRunner, *rest: Any) -> SampledTokens:
            self.counts["step"] += 1
            self.counts["beside"] += streams.under_way(TRAINING)
            self._expect(SERVING, "a serving step")
            return forward(runner, *rest)

        replaced = [
            (SampledTokens, "send", watched_send),
            (SampledTokens, "read", watched_read),
            (ModelRunner, "forward", watched_forward),
            *((Job, name, self._of_training(getattr(Job, name))) for name in ("run", "resume", "interrupt", "close")),
            (build, "choose_coserving", lambda *_: "concurrent"),
            (build, "choose_streams", lambda *_: streams),
            (build, "choose_thread", lambda *_: TrainStream(streams, lambda clock: Slow(streams))),
        ]
        for owner, name, new in replaced:
            self._patches.append(patch.object(owner, name, new))
            self._patches[-1].start()
        return self

    def __exit__(self, *_: Any) -> None:
        for one in self._patches:
            one.stop()

    def _of_training(self, method: Any) -> Any:
        def watched(job: Job, *rest: Any) -> Any:
            self.counts["job"] += 1
            self._expect(TRAINING, f"{method.__name__} of job {job.name}")
            return method(job, *rest)

        return watched

    def _expect(self, stream: str, what: str) -> None:
        if self.streams.current != stream:
            self.wrong.append(f"{what} under {self.streams.current}")


class Slow(HostTiming):
    """Of a slice that takes the device a while."""

    def __init__(self, streams: CheckedStreams) -> None:
        super().__init__()
        self._streams, self._looks, self._stopped = streams, 0, 0

    def stop(self) -> None:
        super().stop()
        self._stopped = self._streams.launched[TRAINING]

    def done(self) -> bool:
        self._looks += 1
        if self._looks > LOOKS:
            self.wait()
        return self._looks > LOOKS

    def wait(self) -> None:
        self._streams.host_waited(TRAINING, self._stopped)


class Forgetful(CheckedStreams):
    """Serving does not wait for what training publishes."""

    def publish(self) -> None:
        pass


def whole_life(
    topology: Topology, model: str, data: str, run_dir: str, overlap: bool, forgetful: bool = False
) -> dict[str, Any]:
    """A round that is promoted, one that is cancelled, one that is cut, an evaluation, an install and a rebuild, all
    beside requests.
    """
    streams = Forgetful() if forgetful else CheckedStreams()
    sections = {"engine": {"kv_tokens": 2048, "max_batch": 8, "overlap": overlap, "concurrent_slice_ms": 1}}
    with Watched(streams) as watched, StreamRules(streams):
        driver = Driver(topology, model, data, run_dir, **sections)
        answers = _rounds(driver)
        engine = driver.replica.engine
        driver.begin((0,), steps=50, round_id=4)
        driver.until(lambda: engine.jobs.under_way)
        try:
            driver.step(m.Rebuild(reason="a test"))
        except CountedLost:
            driver.replica.abandon()
        left = [stream for stream in (SERVING, TRAINING) if streams.under_way(stream)]
        driver.base.renew(driver.config.run.seed)
        driver.start()
        answers["rebuilt"] = serve_alone(driver, 90)
        driver.replica.close()
    return {
        "races": sorted(set(streams.races)), "wrong": sorted(set(watched.wrong)), "left": left, "answers": answers,
        "published": streams.published, **watched.counts,
    }  # fmt: skip


def _rounds(driver: Driver) -> dict[str, Any]:
    member, answers = driver.replica.member, {}

    def ask(id: int) -> None:
        driver.step(m.Submit(request=request(id, [9, 8, id], max_tokens=24, ignore_eos=True)))

    def answered(id: int) -> list[int]:
        driver.until(lambda: bool(driver.events(id)) and driver.events(id)[-1].finish is not None)
        return answer(driver.events(id))

    ask(2)
    driver.step(m.Evaluate())
    driver.wait_for(m.Evaluated)
    driver.begin((0,), steps=2)
    ask(3)
    driver.wait_for(m.StepsDone)
    driver.step(m.Aggregate(round_id=1))
    driver.wait_for(m.Voted)
    ask(4)
    driver.step(m.Settle(round_id=1, commit=True, version=1, publish=True))
    weights = driver.wait_for(m.Published).weights
    ask(5)
    answers |= {id: answered(id) for id in (2, 3, 4, 5)}
    ask(6)
    driver.step(m.Install(version=2, weights=weights))
    driver.until(lambda: driver.replica.engine.scheduler.slots.active == 2)
    ask(7)
    driver.begin((0,), steps=50, round_id=2, base_version=2)
    driver.until(lambda: member.trainer.steps > 2 and driver.replica.engine.jobs.under_way)
    driver.step(m.Settle(round_id=2, commit=False, version=2))
    ask(8)
    driver.begin((0,), steps=50, round_id=3, base_version=2)
    driver.until(lambda: member._stepping and driver.replica.engine.jobs.under_way)
    driver.step(m.FinishSteps(round_id=3))
    driver.step(m.Settle(round_id=3, commit=False, version=2))
    ask(9)
    driver.step(m.Cancel(request_id=9))
    answers |= {id: answered(id) for id in (6, 7, 8, 9)}
    return answers
