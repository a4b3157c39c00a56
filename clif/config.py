"""The configuration: typed, frozen and strict. Free of torch.

Every field carries its unit in its name or in its comment. Unknown keys and impossible combinations are errors
that say what to change. A file is YAML; `section.key=value` arguments override it, parsed as YAML too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from clif.config_load import LoadConfig, MetricsConfig, QualityConfig
from clif.errors import ConfigError
from clif.refusals import sentence
from clif.section import Positive, PositiveFloat, Section, Share
from clif.strict_yaml import apply_override, strict_yaml


class RunConfig(Section):
    name: str = "run"
    """Folder of the run under out_dir."""
    out_dir: Path = Path("runs")
    seed: int = 0
    max_s: PositiveFloat = 3600.0
    """The run ends after this many seconds even when the load or the rounds are not through."""
    linger_s: Annotated[float, Field(ge=0)] = 60.0
    """How long a round that is under way when the load ends may still take, seconds."""
    drain_s: Annotated[float, Field(ge=0)] = 20.0
    """After SIGTERM or SIGINT: how long running requests may still take, seconds. Keep it 5 s under what the launcher
    allows before it kills (torchrun 30 s)."""
    status: Literal["auto", "live", "plain", "off"] = "auto"
    """Progress on rank 0: a live table on a terminal, plain lines elsewhere, off under CI (auto)."""
    rebuilds: Annotated[int, Field(ge=0)] = 3
    """How often in ten minutes a replica is rebuilt in place after an error, on the weights that it has; then its rank
    ends."""
    resume: bool = False
    """Continue from the checkpoints in the run's folder."""
    mode: Literal["clif", "serve_only", "train_only", "time_slice", "split"] = "clif"
    """clif: training in the slack of serving. The others are baselines: no training; no load; serving and training
    take turns by whole optimizer steps; replicas that only serve beside replicas that only train."""
    training_share: Share = 0.5
    """time_slice: share of a replica's time that training gets while there is both to do."""
    trainers: Positive = 1
    """split: how many replicas train, those with the highest numbers; the others serve."""

    @model_validator(mode="after")
    def _of_one_mode(self) -> RunConfig:
        # By value and not by what was given: config.json, which the control process reads, gives everything.
        for field, mode in (("training_share", "time_slice"), ("trainers", "split")):
            value = getattr(self, field)
            if self.mode != mode and value != type(self).model_fields[field].default:
                raise ValueError(f"run.{field} {value} needs run.mode {mode}, not {self.mode}: change one of them")
        return self

    @property
    def adaptive(self) -> bool:
        """Whether rounds and batch sizes follow slack and pressure, as in CLIF; the baselines do not look."""
        return self.mode == "clif"


class LayoutConfig(Section):
    replicas: Positive | None = None
    """Number of replicas; by default all ranks divided by tp_size."""
    tp_size: Positive = 1
    """Ranks that hold one copy of the model together."""
    replica_gpus: tuple[tuple[int, ...], ...] | None = None
    """Explicit form: the ranks (one GPU each) of each replica, e.g. [[0, 1], [2, 3]]."""
    across_hosts: bool = False
    """A replica's ranks may be on several hosts: every layer then waits for the network between them."""

    @property
    def ranks(self) -> int:
        """Ranks that this section asks for when no launcher says how many there are."""
        if self.replica_gpus is not None:
            return sum(map(len, self.replica_gpus))
        return (self.replicas or 1) * self.tp_size


class DistConfig(Section):
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    timeout_s: PositiveFloat = 120.0
    """A collective that takes longer is an error."""
    ranks_per_gpu: Positive = 1
    """Ranks that share a GPU and its memory equally. More than one needs gloo: NCCL wants a GPU per rank."""
    threads_per_rank: Positive | None = None
    """CPU threads of a rank; by default the host's cores divided by its ranks."""
    control_host: str | None = None
    """Address to which the control process binds; by default loopback on one host, else where others reach rank 0."""


class ModelConfig(Section):
    path: str
    """A hub name, a local folder, a .gguf file, or random:<folder or config.json> for random weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on a GPU; on a CPU whichever of bfloat16 and float32 a short measurement finds faster."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_context: Positive = 2048
    """Longest prompt plus answer, tokens."""


class AdapterConfig(Section):
    r: Positive = 8
    lora_alpha: PositiveFloat = 16.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """As in peft.LoraConfig: "all-linear" or the last part of module names."""
    serving_slots: Annotated[int, Field(ge=2)] = 3
    """Versions that can answer at the same time: one active, the others retiring."""


class EngineConfig(Section):
    max_batch: Positive = 16
    """Requests that run at the same time in a replica."""
    kv_tokens: Positive = 8192
    """Size of a replica's KV cache, tokens."""
    block_size: Positive = 16
    """Tokens per KV block."""
    prefix_reuse: bool = True
    """Prompts that begin alike share the full KV blocks of their beginning, within one adapter version."""
    pack_weights: bool = True
    """CPU, bfloat16: keep a second copy of the weights, laid out for the matrix kernels, for serving."""
    lora_kernel: Literal["auto", "torch", "triton"] = "auto"
    """Products of the layers with adapters. triton: one launch for all rows (GPU; a CPU only in Triton's interpreter).
    auto: triton for the shapes that `make tune-gpu` found faster on this make of GPU, else torch."""
    decode_kernel: Literal["auto", "torch", "triton"] = "auto"
    """Attention of rows that continue an answer. triton: reads the KV cache in place (GPU; a CPU only in Triton's
    interpreter). auto: triton on a GPU that can run it, else torch."""
    max_prefill_tokens: Positive = 512
    """Prompt tokens computed in one tick at most; longer prompts go in chunks."""
    coserving: Literal["auto", "mixed", "beside", "turns"] = "auto"
    """mixed: training forwards share the products of serving ticks; beside: training slices run on half of the rank's
    CPU threads; turns: slices between ticks. auto: mixed on a GPU; on a CPU beside with several threads, else turns."""
    slice_ms: PositiveFloat = 40.0
    """Aim for the length of a training slice between two ticks, up to four times as long where the token gaps leave
    that much; at least one layer."""
    beside_slice_ms: PositiveFloat = 160.0
    """The same for a slice beside serving, which no token waits for."""
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
    """Held-out rows that are used, all replicas together; None: all."""
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


class TrainConfig(Section):
    enabled: bool = True
    lr: PositiveFloat = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    clip_norm: PositiveFloat = 1.0
    micro_batch: Positive = 4
    """Samples packed into one forward; the coordinator may choose less or more, up to max_micro_batch."""
    max_micro_batch: Positive = 8
    accumulation: Positive = 1
    """Micro-batches per optimizer step."""

    @model_validator(mode="after")
    def _micro(self) -> TrainConfig:
        if self.micro_batch > self.max_micro_batch:
            raise ValueError(
                f"train.micro_batch {self.micro_batch} exceeds train.max_micro_batch "
                f"{self.max_micro_batch}: raise the latter"
            )
        return self


class FederationConfig(Section):
    rounds: Annotated[int, Field(ge=0)] | None = None
    """Rounds to complete, not more, before the run may end; None: as many as fit while load lasts."""
    local_steps: Positive = 20
    """Optimizer steps of a member in one round at the configured micro-batch: what counts are their samples."""
    min_members: Positive = 1
    round_timeout_s: PositiveFloat = 120.0
    """Local steps are cut off after this time; members are weighted by the samples they did."""
    settle_timeout_s: PositiveFloat = 120.0
    """A round whose aggregation and votes take longer is discarded."""
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    """A candidate is promoted if its held-out loss is at most active * (1 + tolerance)."""
    strategy: Literal["fedavg"] = "fedavg"


class ControlConfig(Section):
    period_s: PositiveFloat = 0.25
    """Slow loop: states, pressure, batch sizes, rounds."""
    report_s: PositiveFloat = 0.1
    """How often a replica reports."""
    lost_after_s: PositiveFloat = 20.0
    """A replica that is silent for longer is FAILED."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a request whose replica failed is given to another one; then it ends as failed."""
    idle_below: Share = 0.6
    """Smoothed utilisation under which a replica has slack."""
    serving_above: Share = 0.9
    """Smoothed utilisation above which it has none. Between the two nothing changes (hysteresis)."""
    hold_s: Annotated[float, Field(ge=0)] = 1.0
    """Slack, or its lack, must last this long before the state changes."""
    smoothing_s: PositiveFloat = 2.0
    """Time constant of the utilisation average."""
    window_s: PositiveFloat = 10.0
    """Requests finished in this window tell the service pressure."""
    medium_share: Share = 0.5
    """Part of the idle replicas that may train under medium pressure, rounded up."""
    high_below: Share = 0.8
    """SLO attainment in the window under which pressure is high."""
    medium_below: Share = 0.95
    """SLO attainment in the window under which pressure is medium."""
    reference_batch: Positive = 8
    """M0 of the coordinator's objective, samples."""

    @model_validator(mode="after")
    def _order(self) -> ControlConfig:
        if self.idle_below >= self.serving_above:
            raise ValueError(
                f"control.idle_below {self.idle_below} must be under control.serving_above {self.serving_above}"
            )
        if self.high_below > self.medium_below:
            raise ValueError(
                f"control.high_below {self.high_below} must not exceed control.medium_below {self.medium_below}"
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
        if self.data.path is not None and not self.data.path.is_file():
            raise ValueError(f"data.path {self.data.path} does not exist: {_get_it(self.data.path)}")
        if self.load.trace is not None and not self.load.trace.path.is_file():
            raise ValueError(f"load.trace.path {self.load.trace.path} does not exist: correct it")
        self._check_mode()
        if not self.train.enabled and self.federation.rounds:
            raise ValueError("federation.rounds asks for rounds but train.enabled is false: change one of them")
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

    @property
    def run_dir(self) -> Path:
        return self.run.out_dir / self.run.name


def _get_it(path: Path) -> str:
    return "run `clif fetch`" if path.parts[:1] == ("assets",) else "correct it"


def load_config(path: Path | str, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides and validate.

    Raises ConfigError with one sentence per mistake.
    """
    try:
        tree = strict_yaml(Path(path).read_text()) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: name a YAML file, as in configs/") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections, not a {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return config_from_tree(tree)


def config_from_tree(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(sentence(dict(e), Config) for e in error.errors())) from error
