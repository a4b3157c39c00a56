"""Sections of the configuration that say what is asked of the model and what is written down. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from clif.config.base import NotNegative, NotNegativeFloat, Period, Positive, PositiveFloat, Section
from clif.types import Sampling

Scale = Annotated[float, Field(gt=0, le=1000)]


class TraceConfig(Section):
    path: Path
    format: Literal["azure", "burstgpt", "mooncake"] = "azure"
    speed: PositiveFloat = 1.0
    """2 replays twice as fast."""
    start_s: NotNegativeFloat = 0.0
    """Offset into the trace, seconds of trace time."""
    lengths: Literal["trace", "data"] = "data"
    """trace: prompt and answer lengths of the trace (end-of-text ignored); data: those of the data set's rows."""
    prompt_scale: Scale = 1.0
    answer_scale: Scale = 1.0
    """The trace's lengths are multiplied by these, then cut to those below; one token at least stays."""
    max_prompt_tokens: Positive | None = None
    max_answer_tokens: Positive | None = None


class LoadConfig(Section):
    kind: Literal["none", "constant", "poisson", "gamma", "trace"] = "none"
    rate_rps: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Of generated load; a trace has its own."""
    cv: Annotated[float, Field(ge=0.01, le=100)] = 3.0
    """Coefficient of variation of the gaps of gamma load: 1 is Poisson, more is burstier."""
    duration_s: PositiveFloat = 60.0
    """A trace is cut off after this time, too (at its replayed speed)."""
    max_requests: Positive | None = None
    split: str = "train"
    """Split of data.path from which prompts are drawn."""
    max_tokens: Positive = 64
    temperature: float = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    ignore_eos: bool = False
    trace: TraceConfig | None = None

    @model_validator(mode="after")
    def _trace(self) -> LoadConfig:
        if (self.kind == "trace") != (self.trace is not None):
            raise ValueError('load.kind "trace" and the section load.trace need each other: give both or neither')
        return self

    @model_validator(mode="after")
    def _sampling(self) -> LoadConfig:
        """What a request may ask is said in one place."""
        try:
            self.sampling(seed=0)
        except ValueError as error:
            raise ValueError(f"load.{error}") from error
        return self

    def sampling(self, seed: int) -> Sampling:
        """How the tokens of a request are chosen. seed: of this request; a greedy one needs none."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=seed if self.temperature > 0 else None,
            ignore_eos=self.ignore_eos,
        )


class QualityConfig(Section):
    exact_match_rows: NotNegative = 0
    """Held-out rows whose answers are generated and compared before and after the run; 0: none."""
    max_tokens: Positive = 64


class MetricsConfig(Section):
    flush_s: Period = 1.0
    flush_rows: Positive = 2000
    device_s: Period = 1.0
    """Interval of device samples."""
    answers: Literal["none", "sample", "all"] = "none"
    """Which answers of users are kept, with their prompts, in RUN/answers.jsonl; sample: every twentieth by id. Those
    of probes are kept always."""
