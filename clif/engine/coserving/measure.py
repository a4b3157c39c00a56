"""Which way of co-serving suits a device is measured when a replica starts: each is tried for a moment. Free of torch.

The engine that is tried is a real one, with requests and training that are made up. It shares the model, the KV cache
and the shadow's gradient with the replica's own, and nothing else; no weight changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clif.config import EngineConfig
from clif.engine.jobs import WAIT, Job, Slice, SliceKind, Slices
from clif.types import CoservingMode, Request, Sampling

if TYPE_CHECKING:
    from clif.engine.engine import Engine

MODES = (CoservingMode.INTERLEAVED, CoservingMode.CONCURRENT, CoservingMode.FUSED)
"""The simplest first."""
LEAD = 1.03
"""What a mode has to be better by than a simpler one: the measurement is short."""
TRIAL_S, WARM_UP_S = 0.3, 0.1
"""Seconds of a trial, and of what comes before it."""
LONGEST_WARM_UP_S, LONGEST_WARM_UP_STEPS = 0.5, 100
"""What comes before it goes on until the training has been computed once, but for no more seconds and steps than these:
kernels are compiled meanwhile."""
PROMPT = 16
"""Tokens of a made-up prompt."""


@dataclass(frozen=True)
class Trial:
    """Tokens/s of answers and of training, and the longest time between two tokens."""

    serving: float = 0.0
    training: float = 0.0
    longest_gap_s: float = 0.0


@dataclass(frozen=True)
class Measured:
    """alone: what serving and training reach without each other."""

    alone: Trial
    trials: dict[CoservingMode, Trial]

    def efficiency(self, mode: CoservingMode) -> float:
        """1: what serving and training get by turns; 2: neither loses anything to the other."""
        trial = self.trials[mode]
        return _share(trial.serving, self.alone.serving) + _share(trial.training, self.alone.training)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def choose_by(measured: Measured, longest_gap_s: float) -> tuple[CoservingMode, str]:
    """The mode of the highest efficiency among those that keep the gaps between tokens, and the figures of all.

    longest_gap_s: what a gap may be. If every mode has a longer one, that of the shortest.
    """
    kept = [mode for mode, trial in measured.trials.items() if trial.longest_gap_s <= longest_gap_s]
    if not kept:
        chosen = min(measured.trials, key=lambda mode: measured.trials[mode].longest_gap_s)
    else:
        chosen = kept[0]
        for mode in kept[1:]:
            if measured.efficiency(mode) > LEAD * measured.efficiency(chosen):
                chosen = mode
    figures = ", ".join(
        f"{mode} {measured.efficiency(mode):.2f} with gaps up to {trial.longest_gap_s * 1000:.0f} ms"
        for mode, trial in measured.trials.items()
    )
    return chosen, f"efficiency {figures}; a gap may be {longest_gap_s * 1000:.0f} ms"


@dataclass(frozen=True)
class Load:
    """Made-up requests that all run at a time. requests: how many; answer: tokens of an answer."""

    requests: int
    answer: int

    @classmethod
    def of(cls, config: EngineConfig, max_context: int) -> Load:
        """Three quarters of a full batch, as far as the KV cache and the context hold their answers."""
        requests = max(1, min(3 * config.max_batch // 4, config.num_kv_tokens // (4 * PROMPT)))
        room = min(config.num_kv_tokens // requests, max_context) - PROMPT
        return cls(requests, max(1, room))

    def one(self, id: int) -> Request:
        prompt = tuple(1 + (id + i) % 7 for i in range(PROMPT))
        return Request(id=id, prompt=prompt, sampling=Sampling(max_tokens=self.answer, ignore_eos=True))


@dataclass(frozen=True)
class Work:
    """Training to be tried: forward and backward of so many tokens, which leave nothing. layers: of the model."""

    slices: Callable[[], Slices[Any]]
    tokens: int
    layers: int


class Progress:
    """Counts what slices have computed of work that is repeated. work: tokens, through forward and backward."""

    def __init__(self, work: Work) -> None:
        self._work, self.repeats = work, 0
        # Layers times rows: of this repeat, and of a whole one. Rows that pad a pass count as long as they do so.
        self._computed, self._whole = 0, 2 * work.layers * work.tokens

    @property
    def tokens(self) -> float:
        return self._work.tokens * (self.repeats + min(1.0, self._computed / self._whole))

    def repeated(self) -> Slices[None]:
        """The slices of the work, over and over again."""
        while True:
            yield from self._counted(self._work.slices())
            self._whole, self._computed = self._computed or self._whole, 0
            self.repeats += 1

    def _counted(self, work: Slices[Any]) -> Slices[None]:
        result: Any = None
        while True:
            try:
                piece = work.send(result)
            except StopIteration:
                return
            if piece is WAIT:
                # The engine knows it by what it is: a copy would be a slice that never runs.
                result = yield piece
                continue
            units = list[int]()
            result = yield replace(piece, work=_noting(piece, units))
            # A forward that went along with a serving step was computed as a whole, and not by its own work.
            self._note(piece, units[0] if units else piece.units)

    def _note(self, piece: Slice, units: int) -> None:
        if piece.kind in (SliceKind.FORWARD, SliceKind.BACKWARD):
            self._computed += piece.tokens * units


def _noting(piece: Slice, units: list[int]) -> Callable[[int], Any]:
    def work(count: int) -> Any:
        units.append(count)
        return piece.work(count)

    return work


def measure(
    make_engine: Callable[[CoservingMode], Engine],
    work: Work,
    load: Load,
    modes: Sequence[CoservingMode] = MODES,
) -> Measured:
    """Try serving alone, training alone, and both in each mode.

    make_engine: a new engine, without requests and jobs.
    """
    first = modes[0]
    serving = _Run(make_engine(first), load, None).trial()
    training = _Run(make_engine(first), None, work).trial()
    alone = Trial(serving.serving, training.training, serving.longest_gap_s)
    return Measured(alone, {mode: _Run(make_engine(mode), load, work).trial() for mode in modes})


class _Run:
    """One engine at work, with requests, a job, or both."""

    def __init__(self, engine: Engine, load: Load | None, work: Work | None) -> None:
        self._engine, self._load = engine, load
        self._progress = None if work is None else Progress(work)
        self._ids: Iterator[int] = iter(range(1 << 30))
        self._tokens, self._last_s, self._longest_s = 0, engine.clock(), 0.0
        if self._progress is not None:
            with engine.streams.training():
                engine.jobs.append(Job("trial", self._progress.repeated()))
        for _ in range(load.requests if load else 0):
            self._ask()

    def trial(self) -> Trial:
        """Leaves the engine without requests and jobs, and the device with nothing to do."""
        clock = self._engine.clock
        try:
            self._warm_up()
            # What was launched before belongs to the warm-up, what is launched until the end to the trial.
            self._engine.streams.synchronize()
            tokens, trained, start = self._tokens, self._trained, clock()
            self._last_s, self._longest_s = start, 0.0
            while clock() - start < TRIAL_S:
                self._step()
            self._engine.streams.synchronize()
            seconds = clock() - start
        finally:
            self._end()
        return Trial((self._tokens - tokens) / seconds, (self._trained - trained) / seconds, self._longest_s)

    def _warm_up(self) -> None:
        start, steps = self._engine.clock(), 0
        while True:
            gone, steps = self._engine.clock() - start, steps + 1
            more = gone < LONGEST_WARM_UP_S or steps < LONGEST_WARM_UP_STEPS
            if gone >= WARM_UP_S and not (self._starting and more):
                return
            self._step()

    @property
    def _trained(self) -> float:
        return 0.0 if self._progress is None else self._progress.tokens

    @property
    def _starting(self) -> bool:
        return self._progress is not None and not self._progress.repeats

    def _step(self) -> None:
        events = self._engine.step()
        if not events:
            return
        now = self._engine.clock()
        self._longest_s, self._last_s = max(self._longest_s, now - self._last_s), now
        for event in events:
            self._tokens += len(event.tokens)
            if event.finish is not None:
                self._ask()

    def _ask(self) -> None:
        assert self._load is not None
        self._engine.scheduler.add(self._load.one(next(self._ids)), self._engine.clock())

    def _end(self) -> None:
        for sequence in self._engine.scheduler.sequences:
            self._engine.scheduler.cancel(sequence.request.id)
        # The step under way, whose rows are thrown away.
        self._engine.serve()
        self._engine.close()
