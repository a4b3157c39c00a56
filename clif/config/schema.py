"""The configuration: typed, frozen and strict. Free of torch.

Every field carries its unit in its name or in its comment. Unknown keys and impossible combinations are errors
that say what to change, and so are fields that were given and cannot matter (clif/config/relevance.py). A file is YAML;
`section.key=value` arguments override it, parsed as YAML too.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from clif.config.base import (
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Ranks,
    Section,
    Share,
    is_there,
)
from clif.config.given import Given, read_given
from clif.config.load import LoadConfig, MetricsConfig, QualityConfig
from clif.config.messages import sentences
from clif.config.relevance import check_relevance
from clif.config.shipped import place_paths
from clif.config.train import ControlConfig, FederationConfig, TrainConfig
from clif.errors import ConfigError
from clif.types import CoservingMode

log = logging.getLogger(__name__)
NAME = re.compile(r"\w[\w.=+@-]*")
MAX_NAME = 100
"""Bytes: a folder's name may have 255, and -2 and so on must fit behind it."""


class RunConfig(Section):
    name: str = "run"
    """Folder of the run under out_dir: letters, digits and . _ - = + @, no path."""
    out_dir: Path = Path("runs")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_s: PositiveFloat = 3600.0
    """The run ends after this many seconds even when the load or the rounds are not through."""
    linger_s: NotNegativeFloat = 60.0
    """How long rounds may still train after the load, seconds; then what they trained is averaged and judged."""
    drain_s: NotNegativeFloat = 20.0
    """After SIGTERM or SIGINT: how long running requests may still take, seconds. Keep it 5 s under what the launcher
    allows before it kills (torchrun 30 s)."""
    status: Literal["auto", "live", "plain", "off"] = "auto"
    """Progress on rank 0: a live table on a terminal, plain lines elsewhere, off under CI (auto)."""
    rebuilds: NotNegative = 3
    """How often in ten minutes a replica is rebuilt in place after an error, on the weights that it has; then its rank
    ends."""
    resume: bool = False
    """Continue from the checkpoints in the run's folder."""
    mode: Literal["clif", "serve_only", "train_only", "time_slice", "split"] = "clif"
    """clif: training in the slack of serving. The others are baselines: no training; no load; serving and training
    take turns by whole optimizer steps; replicas that only serve beside replicas that only train."""
    training_share: Share = 0.5
    """time_slice: share of a replica's time that training gets while there is both to do."""
    trainers: Ranks = 1
    """split: how many replicas train, those with the highest numbers; the others serve."""

    @field_validator("name")
    @classmethod
    def _folder(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(
                "name must be one folder's name of letters, digits and . _ - = + @, beginning with a letter or digit: "
                "where runs go is run.out_dir"
            )
        if len(name.encode()) > MAX_NAME:
            raise ValueError(f"name has {len(name.encode())} bytes: give at most {MAX_NAME}")
        return name

    @property
    def adaptive(self) -> bool:
        """Whether rounds and batch sizes follow slack and pressure, as in CLIF; the baselines do not look."""
        return self.mode == "clif"


class LayoutConfig(Section):
    replicas: Ranks | None = None
    """Number of replicas; by default all ranks divided by tp_size."""
    tp_size: Ranks = 1
    """Ranks that hold one copy of the model together."""
    replica_gpus: tuple[tuple[Annotated[int, Field(ge=0, lt=65536)], ...], ...] | None = None
    """Explicit form: the ranks (one GPU each) of each replica, e.g. [[0, 1], [2, 3]]."""
    across_hosts: bool = False
    """A replica's ranks may be on several hosts: every layer then waits for the network between them."""

    @model_validator(mode="after")
    def _size(self) -> LayoutConfig:
        if self.ranks(1) > 65536:
            raise ValueError(f"layout asks for {self.ranks(1)} ranks: lower layout.replicas or layout.tp_size")
        return self

    def ranks(self, replicas: int) -> int:
        """Ranks that this section asks for when no launcher says how many there are.

        replicas: how many there are to be if the section does not say it either.
        """
        if self.replica_gpus is not None:
            return sum(map(len, self.replica_gpus))
        return (self.replicas or replicas) * self.tp_size


class DistConfig(Section):
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 120.0
    """A collective that takes longer is an error."""
    ranks_per_gpu: Annotated[int, Field(gt=0, le=256)] = 1
    """Ranks that share a GPU and its memory equally. More than one needs gloo: NCCL wants a GPU per rank."""
    threads_per_rank: Annotated[int, Field(gt=0, le=4096)] | None = None
    """CPU threads of a rank; by default the host's cores divided by its ranks."""
    control_host: str | None = None
    """Address to which the control process binds; by default loopback on one host, else where others reach rank 0."""
    secret_file: Path | None = None
    """A file with at least 32 secret bytes, the same on every host and open to its user alone. Needed where hosts do
    not share the run's folder, in which rank 0 leaves the keys of the control port otherwise."""


class ModelConfig(Section):
    path: str
    """A hub name, a local folder, a .gguf file, or random:<folder or config.json> for random weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU; on a CPU whichever of bfloat16 and float32 a short measurement finds faster."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_context: Positive = 2048
    """Longest prompt plus answer, tokens."""


class AdapterConfig(Section):
    r: Annotated[int, Field(gt=0, le=4096)] = 8
    lora_alpha: PositiveFloat = 16.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """As in peft.LoraConfig: "all-linear", a regular expression on full names, or the last parts of module names."""
    serving_slots: Annotated[int, Field(ge=2, le=1024)] = 3
    """Versions that can answer at the same time: one active, the others retiring."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _targets(cls, targets: object) -> object:
        """One sentence instead of one for each type; names are held against the model where it is known."""
        if isinstance(targets, str):
            _check_pattern(targets)
            return targets
        if not isinstance(targets, (list, tuple)) or not all(isinstance(name, str) for name in targets):
            raise ValueError('target_modules must be "all-linear", a regular expression, or a list of names of modules')
        if len(set(targets)) < len(targets):
            raise ValueError("target_modules lists a name twice: remove one")
        return targets


class EngineConfig(Section):
    max_batch: Annotated[int, Field(gt=0, le=65536)] = 16
    """Requests that run at the same time in a replica."""
    kv_tokens: Positive = 8192
    """Size of a replica's KV cache, tokens."""
    block_size: Positive = 16
    """Tokens per KV block."""
    prefix_reuse: bool = True
    """Prompts that begin alike share the full KV blocks of their beginning, within one adapter version."""
    prepack_weights: bool = True
    """CPU, bfloat16: keep a second copy of the weights, laid out for the matrix kernels, for serving."""
    lora_kernel: Literal["auto", "torch", "triton"] = "auto"
    """Products of the layers with adapters. triton: one launch for all rows (GPU; a CPU only in Triton's interpreter).
    auto: triton for the shapes that `make tune-gpu` found faster on this make of GPU, else torch."""
    decode_kernel: Literal["auto", "torch", "triton"] = "auto"
    """Attention of rows that continue an answer. triton: reads the KV cache in place (GPU; a CPU only in Triton's
    interpreter). auto: triton on a GPU that can run it, else torch."""
    max_prefill_tokens: Positive = 512
    """Prompt tokens computed in one step at most; longer prompts go in chunks."""
    coserving: CoservingMode = CoservingMode.AUTO
    """fused: training forwards share the products of serving steps; concurrent: training slices run on half of the
    rank's CPU threads; interleaved: slices between steps. auto: fused on a GPU; on a CPU concurrent with several
    threads, otherwise interleaved."""
    slice_ms: PositiveFloat = 40.0
    """Aim for the length of a training slice between two steps, up to four times as long where the token gaps leave
    that much; at least one layer."""
    concurrent_slice_ms: PositiveFloat = 160.0
    """The same for a slice that runs while serving goes on, which no token waits for."""
    activation_mib: Positive = 1024
    """Memory for what training forwards keep for their backwards; layers that do not fit are computed again."""
    eval_tokens: Positive = 256
    """Tokens of one held-out forward."""

    @model_validator(mode="after")
    def _blocks(self) -> EngineConfig:
        if self.kv_tokens % self.block_size:
            raise ValueError(
                f"engine.kv_tokens {self.kv_tokens} is not a multiple of engine.block_size {self.block_size}"
            )
        return self


class SloConfig(Section):
    ttft_ms: PositiveFloat = 1000.0
    tpot_ms: PositiveFloat = 200.0
    deadline_ms: PositiveFloat | None = None
    """End to end; None: no deadline."""
    margin: Share = 0.3
    """Share of the token gap that training may never spend."""
    late: Literal["serve", "reject"] = "serve"
    """What happens to a request whose deadline no replica can meet: served all the same, or rejected."""


class DataConfig(Section):
    path: Path | None = None
    """JSON lines: instruction/input/output, messages, or prompt/completion rows."""
    train_split: str = "train"
    heldout_split: str = "test"
    """Rows of these values in the field "split"."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For rows that have no field "split": this share of the different prompts is held out, chosen by run.seed."""
    heldout_rows: Positive | None = None
    """Held-out rows that are used for the loss, all replicas together: half of their prompts decide promotions, half
    measure quality. None: all."""
    shard: Literal["round_robin", "client"] = "round_robin"
    """How training rows are shared among replicas: in turn, or by the field "client"."""
    max_sample_tokens: Positive = 512
    """A longer sample, or one longer than model.max_context, is rejected with a reason."""

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
    load: LoadConfig = LoadConfig()
    quality: QualityConfig = QualityConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _together(self) -> Config:
        needs_data = [
            name
            for name, wanted in (
                ("train.enabled", self.train.enabled),
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
        if self.model.max_context > self.engine.kv_tokens:
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
        if mode == "train_only" and self.load.kind != "none":
            raise ValueError(f"run.mode train_only takes no load: set load.kind=none, not {self.load.kind}")

    def _check_training(self) -> None:
        train, rounds = self.train, self.federation.rounds
        if not train.enabled and rounds:
            raise ValueError("federation.rounds asks for rounds but train.enabled is false: change one of them")
        if train.enabled and self.load.kind == "none" and not self.run.linger_s:
            raise ValueError(
                "train.enabled is true but there is no time to train: without load rounds last for run.linger_s, "
                "which is 0: raise it, or set train.enabled=false"
            )
        # The baselines leave the size as it is: there the largest one means nothing.
        if self.run.adaptive and train.micro_batch > train.max_micro_batch:
            raise ValueError(
                f"train.micro_batch {train.micro_batch} exceeds train.max_micro_batch {train.max_micro_batch}: raise "
                "the latter"
            )

    @property
    def run_dir(self) -> Path:
        return self.run.out_dir / self.run.name


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"target_modules {pattern[:60]!r} is not a regular expression ({error}): correct it, or give a list of the "
            "last parts of module names"
        ) from error


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
        return Config.model_validate(place_paths(given.tree))
    except ValidationError as error:
        raise ConfigError(sentences(error.errors(), Config, given.where)) from error
