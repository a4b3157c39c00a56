"""Sections of the configuration about the load, quality probes and metrics. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from clif.config.base import NotNegative, NotNegativeFloat, Period, Positive, PositiveFloat, Section
from clif.types import Sampling

Scale = Annotated[float, Field(gt=0, le=1000)]
QualityMetric = Literal[
    "loss",
    "perplexity",
    "exact_match",
    "accuracy",
    "bleu",
    "rouge",
    "chrf",
    "codebleu",
    "json_valid",
    "pass_rate",
]
QUALITY_METRICS: tuple[QualityMetric, ...] = get_args(QualityMetric)
CodeLanguage = Literal["c", "c_sharp", "cpp", "go", "java", "javascript", "php", "python", "ruby", "rust"]


class TraceConfig(Section):
    path: Path
    """The trace."""
    format: Literal["azure", "burstgpt", "mooncake"] = "azure"
    """`azure` (CSV: TIMESTAMP, ContextTokens, GeneratedTokens), `burstgpt` (CSV: Timestamp, Request tokens, Response
    tokens), `mooncake` (JSON lines: timestamp in ms, input_length, output_length)."""
    speed: PositiveFloat = 1.0
    """2 replays twice as fast."""
    start_s: NotNegativeFloat = 0.0
    """Where the replay begins, in trace time after the first request."""
    lengths: Literal["trace", "data"] = "data"
    """`data`: prompts as the data set has them, answers up to `load.max_tokens`. `trace`: prompts cut or repeated to
    the trace's length, answers of exactly its length; `load.max_tokens` and `load.ignore_eos` do not count then. Where
    a `mooncake` line has `hash_ids`, the prompt is made of them instead: each stands for a block of 512 tokens, drawn
    at random from those of the data set's prompts, and equal ids give equal blocks, so that prompts share their
    beginnings as in the trace."""
    prompt_scale: Scale = 1.0
    """The trace's prompts are this many times as long, up to 1000; blocks of `hash_ids` as well, so that what is shared
    stays the same share."""
    answer_scale: Scale = 1.0
    """The same for answers; one token at least stays."""
    max_prompt_tokens: Positive | None = None
    """[tokens] Longer prompts are cut to this, after scaling. A line of the log says how many were. Without it, a
    request longer than `model.max_context` is rejected."""
    max_answer_tokens: Positive | None = None
    """[tokens] The same for answers."""


class LoadConfig(Section):
    kind: Literal["none", "constant", "poisson", "gamma", "trace"] = "none"
    """`constant`, `poisson`, `gamma` (bursty), `trace`, or `none`."""
    rate_rps: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Mean rate of generated load."""
    cv: Annotated[float, Field(ge=0.01, le=100)] = 3.0
    """Coefficient of variation of the gaps of `gamma` load: 1 is Poisson, more is burstier; from 0.01 to 100."""
    duration_s: PositiveFloat = 60.0
    """Length of the load. It also cuts a trace, in replay time."""
    max_requests: Positive | None = None
    """[requests] Upper bound."""
    split: str = "train"
    """Split of `data.path` from which prompts are drawn."""
    max_tokens: Positive = 64
    """[tokens] Longest answer."""
    temperature: float = 0.0
    """0 is greedy; otherwise from 1e-8 to 1000."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """1 switches it off."""
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """[tokens] 0 switches it off."""
    ignore_eos: bool = False
    """Answer to `max_tokens`, past the end-of-text token."""
    trace: TraceConfig | None = None
    """The section below; it and `kind: trace` need each other."""

    @model_validator(mode="after")
    def _trace(self) -> LoadConfig:
        if (self.kind == "trace") != (self.trace is not None):
            raise ValueError('load.kind "trace" and the section load.trace need each other: give both or neither')
        return self

    @model_validator(mode="after")
    def _sampling(self) -> LoadConfig:
        """Apply the limits of a request, which clif.types.Sampling holds."""
        try:
            self.sampling(seed=0)
        except ValueError as error:
            raise ValueError(f"load.{error}") from error
        return self

    def sampling(self, seed: int) -> Sampling:
        """Sampling parameters of a request. seed: of this request; unused if it is greedy."""
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
    """[rows] Held-out rows whose answers are generated before and after the run and compared with the known ones: drawn
    by `run.seed` from those that decide no promotion, at most as many as there are. 0: none."""
    max_tokens: Positive = 64
    """[tokens] Longest of these answers."""
    metrics: tuple[QualityMetric, ...] = ("loss", "perplexity", "exact_match")
    """What these answers and the held-out loss are scored by, see [quality](quality.md): `loss`, `perplexity`,
    `exact_match`, `accuracy`, `bleu`, `rouge`, `chrf`, `codebleu`, `json_valid`, `pass_rate`."""
    earlier_versions: NotNegative = 0
    """After the load, so many versions before the active one answer the same rows, too, the newest ones, so that the
    table of quality has a line for each."""
    code_language: CodeLanguage = "python"
    """Language of the answers for `codebleu`, unless a row has the field `language`."""
    test_command: tuple[str, ...] = ()
    """The command by which `pass_rate` runs a row's `test`; exit status 0: passed. Without it nothing that a model
    wrote is run. `{program}` is the path of a file with the answer and below it the test, `{answer}` and `{test}` of
    files with one of them, `{folder}` of their folder."""
    test_timeout_s: Period = 10.0
    """A test that takes longer has failed."""

    @model_validator(mode="after")
    def _names_files(self) -> QualityConfig:
        given = " ".join(self.test_command)
        if self.test_command and not any(name in given for name in ("{program}", "{answer}", "{folder}")):
            raise ValueError(
                "quality.test_command names no file of the answer: put {program}, {answer} or {folder} where the "
                "command takes a path"
            )
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("quality.metrics has a name twice: leave one out")
        return self


class MetricsConfig(Section):
    flush_s: Period = 1.0
    """Rows reach the file at least this often while the process works."""
    flush_rows: Positive = 2000
    """[rows] Rows also reach the file as soon as this many are buffered."""
    device_s: Period = 1.0
    """Interval of device samples."""
    answers: Literal["none", "sample", "all"] = "none"
    """Which answers of users are kept, with their prompts, in `answers.jsonl` in the run's folder, which only its owner
    can read: `none`, `sample` (every twentieth, by id) or `all`. Those of probes are kept always, with the known
    answer. See [metrics](metrics.md#answersjsonl)."""
