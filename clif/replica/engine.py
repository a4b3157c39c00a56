"""The engine of one replica: serving ticks, and slices of training jobs between them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from clif.config import SloConfig
from clif.replica.jobs import Job
from clif.replica.price import Prices, may_train
from clif.replica.runner import WAIT, ModelRunner, Slice
from clif.replica.sampling import make_rng, sample
from clif.replica.scheduler import Chunk, Scheduler
from clif.types import TokenEvent


@dataclass
class TickRecord:
    """What one tick did. Seconds; 0 rows: nothing was served."""

    decode_rows: int = 0
    prefill_tokens: int = 0
    serve_s: float = 0.0
    train_kind: str = ""
    train_s: float = 0.0


@dataclass
class Engine:
    """Serves and learns. jobs: training work in the order in which it is done; record: what the last turn did."""

    runner: ModelRunner
    scheduler: Scheduler
    slo: SloConfig
    clock: Callable[[], float] = time.monotonic
    prices: Prices = field(default_factory=Prices)
    jobs: deque[Job] = field(default_factory=deque)
    record: TickRecord = field(default_factory=TickRecord)

    def serve(self) -> list[TokenEvent]:
        """One iteration over all running requests: schedule, run, sample, settle."""
        self.record = TickRecord()
        chunks = self.scheduler.schedule()
        if not chunks:
            return []
        start = self.clock()
        logits = self.runner.serve(chunks)
        sampling = [c.sequence for c in chunks if c.samples]
        for sequence in sampling:
            if sequence.last_s is None:
                sequence.rng = make_rng(sequence.request, self.runner.device)
        tokens = sample(logits, [s.request.sampling for s in sampling], [s.rng for s in sampling])
        now = self.clock()
        self._note(chunks, now - start)
        return self.scheduler.settle(chunks, tokens, now)

    def learn(self) -> None:
        """At most one slice of the first job, and only if every running and waiting request can afford it."""
        while self.jobs and self.jobs[0].upcoming is None:
            self.jobs.popleft()
        if not self.jobs or not self._affordable(self.jobs[0].upcoming):
            return
        job, piece = self.jobs[0], self.jobs[0].upcoming
        start = self.clock()
        job.run()
        if piece is not WAIT:
            self.record.train_kind, self.record.train_s = piece.kind, self.clock() - start
            self.prices.observe_slice(piece.kind, piece.tokens * piece.layers, self.record.train_s)

    @property
    def busy(self) -> bool:
        """There is something to do at once."""
        return self.serving or any(job.upcoming not in (None, WAIT) for job in self.jobs)

    @property
    def serving(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def _affordable(self, piece: Slice) -> bool:
        if piece is WAIT:
            return True
        running, scheduler = self.scheduler.running, self.scheduler
        context = sum(s.computed for s in running)
        # Rows of the next tick: a token per answer, and the prompts that wait, within the tick's budget.
        prompts = sum(len(s.tokens) - s.computed for s in (*running, *scheduler.waiting) if s.last_s is None)
        rows = sum(s.last_s is not None for s in running) + min(prompts, scheduler.config.max_prefill_tokens)
        slice_s = self.prices.slice_s(piece.kind, piece.tokens * piece.layers)
        sequences = (*running, *scheduler.waiting)
        return may_train(self.clock(), slice_s, self.prices.tick_s(rows, context), sequences, self.slo)[0]

    def _note(self, chunks: list[Chunk], seconds: float) -> None:
        decode = [c for c in chunks if c.is_decode]
        rows = sum(c.stop - c.start for c in chunks)
        self.record.decode_rows, self.record.prefill_tokens = len(decode), rows - len(decode)
        self.record.serve_s = seconds
        self.prices.observe_tick(rows, sum(c.stop for c in chunks), seconds)
