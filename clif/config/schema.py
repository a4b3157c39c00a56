"""The configuration: typed, frozen and strict. Free of torch.

Every field carries its unit in its name or in its comment. Unknown keys and impossible combinations are errors
that say what to change, and so are given fields without effect (clif/config/relevance.py). A file is YAML;
`section.key=value` arguments override it and are parsed as YAML, too.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from clif.config.base import (
    Positive,
    PositiveFloat,
    Section,
    Share,
    is_there,
)
from clif.config.given import Given, read_given
from clif.config.jobs import JobsConfig
from clif.config.load import LoadConfig, MetricsConfig, QualityConfig
from clif.config.messages import sentences
from clif.config.model import AdapterConfig, EngineConfig, ModelConfig
from clif.config.relevance import check_relevance
from clif.config.run import DistConfig, LayoutConfig, RunConfig
from clif.config.serve import ServeConfig
from clif.config.shipped import with_shipped_paths
from clif.config.train import ControlConfig, FederationConfig, TrainConfig
from clif.errors import ConfigError

log = logging.getLogger(__name__)


class SloConfig(Section):
    ttft_ms: PositiveFloat = 1000.0
    """Time to first token."""
    tpot_ms: PositiveFloat = 200.0
    """Mean time per output token after the first. The time left for training is computed from each single gap."""
    deadline_ms: PositiveFloat | None = None
    """End to end. `null`: no deadline."""
    margin: Share = 0.3
    """[share] Part of the two token budgets that training may never spend."""
    late: Literal["serve", "reject"] = "serve"
    """A request whose deadline no replica can meet: `serve` it all the same, or `reject` it."""


class DataConfig(Section):
    path: Path | None = None
    """JSON lines of `instruction`/`input`/`output`, `messages`, or `prompt`/`completion`; see
    [operations](operations.md)."""
    train_split: str = "train"
    """Value of the field `split` of training rows."""
    heldout_split: str = "test"
    """Value of the field `split` of held-out rows."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """[share] For rows that have no field `split`: this share of the different prompts, one at least, is held out and
    gets the split `heldout_split`, the others `train_split`. Which, depends on `run.seed` and on the prompts, not on
    their order. Refused if any row has a split."""
    heldout_rows: Positive | None = None
    """[rows] Held-out rows used for the loss, all replicas together, at most as many as there are; drawn by `run.seed`.
    With training, half of their prompts decide promotions and the other half measures quality. `null`: all."""
    shard: Literal["round_robin", "client"] = "round_robin"
    """Which replica trains on which rows: in turn, or by the field `client`."""
    max_sample_tokens: Positive = 512
    """[tokens] A longer sample, or one longer than `model.max_context`, is left out, with the reason in the log. If
    none is left, the run is refused."""

    @model_validator(mode="after")
    def _apart(self) -> DataConfig:
        if self.heldout_share is not None and self.train_split == self.heldout_split:
            raise ValueError(
                f"data.heldout_share needs two splits, but data.train_split and data.heldout_split are both "
                f'"{self.train_split}": change one'
            )
        return self


class Config(Section):
    """All of a run. Read it with load_config."""

    run: RunConfig = RunConfig()
    layout: LayoutConfig = LayoutConfig()
    dist: DistConfig = DistConfig()
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    engine: EngineConfig = EngineConfig()
    slo: SloConfig = SloConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    federation: FederationConfig = FederationConfig()
    control: ControlConfig = ControlConfig()
    jobs: JobsConfig = JobsConfig()
    load: LoadConfig = LoadConfig()
    quality: QualityConfig = QualityConfig()
    metrics: MetricsConfig = MetricsConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _together(self) -> Config:
        needs_data = [
            name
            for name, wanted in (
                # With clients, the data of training jobs arrive while the run lasts.
                ("train.enabled", self.train.enabled and not self.online),
                ("load.kind", self.load.kind != "none"),
                ("quality.exact_match_rows", self.quality.exact_match_rows > 0),
            )
            if wanted
        ]
        if self.data.path is None and needs_data:
            raise ValueError(f"{', '.join(needs_data)} need instruction data: set data.path")
        if self.data.path is not None and not is_there(self.data.path):
            raise ValueError(f"data.path {self.data.path} does not exist: {_get_it(self.data.path)}")
        if self.load.trace is not None and not is_there(self.load.trace.path):
            raise ValueError(f"load.trace.path {self.load.trace.path} does not exist: correct it")
        self._check_mode()
        self._check_training()
        self._check_emulated()
        if self.model.max_context > self.kv_tokens_bound:
            raise ValueError(
                f"model.max_context {self.model.max_context} does not fit engine.kv_tokens {self.engine.kv_tokens}: "
                "one request of full length must fit the KV cache"
            )
        return self

    def _check_mode(self) -> None:
        mode, trains = self.run.mode, self.train.enabled
        if mode == "serve_only" and trains:
            raise ValueError("run.mode serve_only does not train: set train.enabled=false or change run.mode")
        if mode in ("train_only", "time_slice", "split") and not trains:
            raise ValueError(f"run.mode {mode} trains but train.enabled is false: change one of them")
        if mode == "train_only" and self.online:
            raise ValueError("run.mode train_only takes no requests: leave out serve.http.port")
        if mode == "train_only" and self.load.kind != "none":
            raise ValueError(f"run.mode train_only takes no load: set load.kind=none, not {self.load.kind}")

    def _check_training(self) -> None:
        train, rounds = self.train, self.federation.rounds
        if not train.enabled and rounds:
            raise ValueError("federation.rounds asks for rounds but train.enabled is false: change one of them")
        if train.enabled and self.load.kind == "none" and not self.run.linger_s and not self.online:
            raise ValueError(
                "train.enabled is true but there is no time to train: without load rounds last for run.linger_s, "
                "which is 0: raise it, or set train.enabled=false"
            )
        # The baselines never change the size: its upper bound has no effect there.
        if self.run.adaptive and train.micro_batch > train.max_micro_batch:
            raise ValueError(
                f"train.micro_batch {train.micro_batch} exceeds train.max_micro_batch {train.max_micro_batch}: raise "
                "the latter"
            )

    def _check_emulated(self) -> None:
        times = self.engine.emulated
        if isinstance(times, Path) and not is_there(times) and not is_there(times / "run.h5"):
            raise ValueError(f"engine.emulated {times} is no run and no run.h5: correct it, or give default")

    @property
    def online(self) -> bool:
        """Whether requests come from clients: the run lasts until it is drained."""
        return self.serve.http.port is not None

    @property
    def kv_tokens_bound(self) -> int:
        """The most tokens of a replica's KV cache: for engine.kv_tokens auto, what requests of full length fill."""
        engine, size = self.engine, self.engine.block_size
        if engine.kv_tokens != "auto":
            return engine.kv_tokens
        return engine.max_batch * -(-self.model.max_context // size) * size

    @property
    def run_dir(self) -> Path:
        return self.run.out_dir / self.run.name


def _get_it(path: Path) -> str:
    return "run `clif fetch`" if path.parts[:1] == ("assets",) else "correct it"


def load_config(path: Path | str, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides and validate.

    What an override leaves without effect of the file is told in the log. Raises ConfigError with one sentence per
    mistake.
    """
    given = read_given(path, overrides)
    config = _validate(given)
    for note in check_relevance(config, given.origins):
        log.info("%s", note)
    return config


def config_from_tree(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values. Raises ConfigError."""
    return _validate(Given(tree))


def _validate(given: Given) -> Config:
    try:
        return Config.model_validate(with_shipped_paths(given.tree))
    except ValidationError as error:
        raise ConfigError(sentences(error.errors(), Config, given.where)) from error
