"""The engine of one replica: serving steps, and training slices in what they leave.

A serving step is one iteration over all running requests; a strategy of clif/engine/coserving decides how much
training runs between two of them, or with one.

Order of a step: plan (what training does), learn (a slice, if there is one), serve (schedule, fill, forward, settle).
The plan comes first, and is a step of its own: it depends on a clock and on costs that were measured here, so that the
leader of a replica makes it and its peers follow it. It is made right before the slice that it allows. It considers the
requests whose tokens have just been sent and those that have just arrived, and the predicted time of the serving step
after the slice.

Invariants: a token waits for one training slice at most; a slice begins only if every running and waiting request can
afford it; an error in training costs the job and no request; what training does is given to its stream, a serving step
to that of serving (see clif/engine/streams.py).

Sources: Orca (Yu et al., OSDI 2022), for scheduling by iteration; FlexLLM (Miao et al., 2024), for co-serving.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from clif.config import Config, EngineConfig
from clif.distributed.collectives import TpGroup
from clif.engine.batch import Batch
from clif.engine.coserving.backlog import NO_BACKLOG, Backlog
from clif.engine.coserving.demand import Asked, Demand
from clif.engine.coserving.strategy import StepView
from clif.engine.cost_model import CostModel
from clif.engine.job_queue import JobQueue
from clif.engine.jobs import Slice
from clif.engine.runner import ModelRunner
from clif.engine.sampling import SampledTokens
from clif.engine.scheduler import Chunk, Scheduler, Sequence
from clif.engine.step_plan import NO_TRAINING, StepPlan
from clif.engine.step_record import StepRecord
from clif.engine.streams import OneStream, Streams
from clif.engine.training_half import TrainingHalf
from clif.types import Regime, Request, TokenEvent, TokenLogprob

if TYPE_CHECKING:
    from clif.models.weights.loading import LoadedModel


class Launched(NamedTuple):
    """A step under way. fused: the training forward that it took along; start: on the engine's clock; captured: it is
    the replay of a graph without prompts; late: the batch, if its tokens are chosen once the step before is settled."""

    chunks: list[Chunk]
    tokens: SampledTokens
    fused: Slice | None
    regime: Regime
    start: float
    captured: bool
    late: Batch | None


@dataclass
class Engine:
    """Serves and learns. overlap: launch a step before the one before is settled. asynchronous: the device computes
    after a launch has returned. record: what the last step did.

    backlog: requests that wait at the dispatcher; None: not known.
    """

    runner: ModelRunner
    scheduler: Scheduler
    training_half: TrainingHalf
    tp_group: TpGroup = field(default_factory=TpGroup)
    streams: Streams = field(default_factory=OneStream)
    clock: Callable[[], float] = time.monotonic
    overlap: bool = False
    asynchronous: bool = False
    record: StepRecord = field(default_factory=StepRecord)
    backlog: Backlog | None = NO_BACKLOG
    demand: Demand = field(default_factory=Demand)
    _launched: Launched | None = None

    @classmethod
    def from_config(cls, config: Config, loaded: LoadedModel | None = None, tp_group: TpGroup | None = None) -> Engine:
        """Everything of one process that serves and learns: model, adapters, KV cache, scheduler. Collective.

        loaded: by default the model that the configuration names, on the first device that it allows. It is taken
        apart: one engine only. tp_group: the ranks that share the model. Raises ConfigError, and LayoutError where
        they cannot share it.
        """
        # Not above: the builder knows this class.
        from clif.engine.build import load_engine

        return load_engine(config, loaded, tp_group)

    @property
    def config(self) -> EngineConfig:
        return self.scheduler.config

    @property
    def jobs(self) -> JobQueue:
        return self.training_half.jobs

    @property
    def cost_model(self) -> CostModel:
        return self.training_half.strategy.costs

    @property
    def busy(self) -> bool:
        """There is something to do at once."""
        return self.serving or self.jobs.ready

    @property
    def serving(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._launched)

    @property
    def training(self) -> bool:
        """A slice runs concurrently with this step, or ran in it."""
        return self.jobs.under_way or self.record.train_s > 0

    def close(self) -> None:
        """Give up all training; nothing of it, and no serving step, runs any more."""
        with self.streams.training():
            self.jobs.close()
        self.streams.synchronize()

    def step(self, plan: StepPlan | None = None) -> list[TokenEvent]:
        """Train and serve once; plan: by default this engine's own. Raises the RuntimeError of a slice that broke."""
        plan = plan or self.plan()
        self.learn(plan)
        return self.serve(plan)

    def plan(self, arrivals: Seq[Request] = ()) -> StepPlan:
        """Decide the training of this step. The leader alone calls it, once a step.

        arrivals: requests that the step's messages bring: they wait like others, and their prompts are rows of it.
        """
        if arrivals:
            prompts = sum(len(request.prompt) for request in arrivals)
            asked = sum(request.sampling.max_tokens for request in arrivals)
            self.demand.arrived(self.clock(), len(arrivals), prompts, asked)
        with self.streams.training():
            if not self.training_half.collect():
                return NO_TRAINING
            view = self._view(arrivals)
            return self.training_half.plan(view, self.serving or bool(arrivals), self.clock)

    def _view(self, arrivals: Seq[Request]) -> StepView:
        # An arrival may have waited for the slice of the step before.
        held_up = arrivals[0].id if arrivals and self.training_half.holds_up else None
        now, demand = self.clock(), self.demand
        asked = Asked(demand.tokens_per_s(now), demand.prompt_tokens)
        return StepView.of(self.scheduler, now, arrivals, self.record.serve_s, held_up, self.backlog, asked)

    def follow(self, plan: StepPlan) -> None:
        """On the leader's peers: begin the passes that it began while it planned."""
        with self.streams.training():
            self.training_half.follow(plan)

    def learn(self, plan: StepPlan) -> None:
        """Training between two steps, as planned. Raises the RuntimeError of a slice that broke."""
        self.record = self.training_half.begin(plan)
        with self.streams.training():
            self.training_half.learn(plan, self.record, self.clock)

    def serve(self, plan: StepPlan = NO_TRAINING) -> list[TokenEvent]:
        """One step over all running requests: schedule, fill, forward, settle."""
        with self.streams.serving():
            return self._overlapped_step(plan) if self.overlap else self._normal_step(plan)

    def _normal_step(self, plan: StepPlan) -> list[TokenEvent]:
        chunks = self.scheduler.schedule()
        return self._settle(self._launch(chunks, plan)) if chunks else []

    def _overlapped_step(self, plan: StepPlan) -> list[TokenEvent]:
        """Launch this step, then settle the one before: the device computes while the host does everything else.

        Its rows take their ids from the step before on the device. What it computes for a sequence that turns out to
        have ended is thrown away when it is settled, and only then are blocks and versions released. Where its tokens
        depend on those of the step before, they are chosen after that is settled: the device computes all else before.
        """
        chunks = self.scheduler.schedule()
        before, self._launched = self._launched, self._launch(chunks, plan) if chunks else None
        events = self._settle(before) if before else []
        if self._launched is not None and self._launched.late is not None:
            self.runner.choose(self._launched.late, self._launched.tokens)
        return events

    def _launch(self, chunks: list[Chunk], plan: StepPlan) -> Launched:
        fused, start = self.training_half.fused(plan), self.clock()
        batch = self.runner.fill(chunks, fused is not None)
        tokens, fused = self._forward(batch, fused)
        regime = Regime.FUSED if fused else Regime.CONCURRENT if self.jobs.under_way else Regime.ALONE
        late = batch if batch.late else None
        # All rows of a step without prompts choose a token.
        captured = batch.captured is not None and batch.ends is None
        return Launched(chunks, tokens, fused, regime, start, captured, late)

    def _forward(self, batch: Batch, fused: Slice | None) -> tuple[SampledTokens, Slice | None]:
        """The step's tokens, and the training forward that it really took along."""
        if fused is None:
            return self.runner.forward(batch), None
        try:
            tokens = self.runner.forward(batch, fused.fused_pass)
        except RuntimeError as error:
            if self.tp_group.size > 1:
                # The peers are in the middle of the same step, and would wait for this rank.
                raise
            # The serving rows did nothing wrong: they are computed again, over what they have written.
            self.jobs.fail(error)
            return self.runner.forward(batch), None
        self.jobs.resume(None)
        return tokens, fused

    def _settle(self, step: Launched) -> list[TokenEvent]:
        tokens, now = step.tokens.read(), self.clock()
        # The device has done all that it was given before this step.
        self.training_half.note_done(self.record)
        # Between launch and settle there may be other work, of the host or of the device: that of the step is measured.
        own = self.overlap or self.asynchronous
        self._note(step, step.tokens.seconds() if own else now - step.start)
        events = self.scheduler.settle(step.chunks, tokens, now)
        self.demand.answered(now, len(tokens), sum(event.finish is not None for event in events))
        logprobs = step.tokens.logprobs()
        if logprobs:
            events = [_with_logprobs(event, logprobs) for event in events]
            scoring = [chunk.sequence for chunk in step.chunks if chunk.sequence.scored is not None]
            return _with_prompts(events, scoring) if scoring else events
        return events

    def _note(self, step: Launched, seconds: float) -> None:
        _, starts, stops, samples = zip(*step.chunks, strict=True)
        context = sum(stops)
        rows = context - sum(starts)
        all_decode = rows == len(stops) and all(samples)
        decodes = rows if all_decode else sum(chunk.is_decode for chunk in step.chunks)
        self.record.note_serving(decodes, rows, step.regime, seconds)
        if step.fused is not None:
            alone_s = self.cost_model.step_s(rows, context, captured=all_decode)
            self.record.note_fused(step.fused.kind, seconds, alone_s)
            rows += step.fused.tokens
        self.cost_model.observe_step(rows, context, seconds, step.regime, step.captured)


def _with_prompts(events: list[TokenEvent], scoring: list[Sequence]) -> list[TokenEvent]:
    """The first tokens of these answers, with the log-probabilities of their prompts; they are sent once."""
    scored = {sequence.id: sequence for sequence in scoring}
    found = []
    for event in events:
        sequence = scored.get(event.request_id)
        if sequence is not None and event.tokens:
            event = replace(event, prompt_logprobs=tuple(sequence.scored or ()))
            sequence.scored = None
        found.append(event)
    return found


def _with_logprobs(event: TokenEvent, logprobs: dict[int, TokenLogprob]) -> TokenEvent:
    """logprobs: of a step, by request id."""
    found = logprobs.get(event.request_id)
    return replace(event, logprobs=(found,)) if event.tokens and found else event
