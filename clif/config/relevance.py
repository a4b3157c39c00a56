"""The conditions under which a field has an effect, as data. A given field without effect is refused. Free of torch.

Only files and overrides are checked, neither defaults nor config.json, which gives every field. An override that
switches something off takes precedence, as in `train.enabled=false` after a file that sets train.lr: the fields of the
file that it leaves without effect are logged and not refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clif.config.given import Origin
from clif.config.yaml import KeyPath
from clif.errors import ConfigError


@dataclass(frozen=True)
class Need:
    """A field that must have one of the values `among`; without these, any value except those of `but`."""

    field: str
    among: tuple[Any, ...] = ()
    but: tuple[Any, ...] = ()

    def met(self, config: object) -> bool:
        value = value_of(config, self.field)
        return value in self.among if self.among else value not in self.but

    def __str__(self) -> str:
        return f"{self.field} {_listed(self.among)}" if self.among else f"{self.field} other than {_listed(self.but)}"


@dataclass(frozen=True)
class Either:
    """One of several needs is enough."""

    needs: tuple[Need, ...]

    def met(self, config: object) -> bool:
        return any(need.met(config) for need in self.needs)

    def __str__(self) -> str:
        return " or ".join(map(str, self.needs))


TRAINS = Need("train.enabled", among=(True,))
LOAD = Need("load.kind", but=("none",))
GENERATED = Need("load.kind", among=("constant", "poisson", "gamma"))
TRACE = Need("load.kind", among=("trace",))
PROBES = Need("quality.exact_match_rows", but=(0,))
DATA = Need("data.path", but=(None,))
ONLINE = Need("serve.http.port", but=(None,))
REQUESTS = Either((LOAD, ONLINE))
SERVES = Either((LOAD, PROBES, ONLINE))
ADAPTS = Need("run.mode", among=("clif",))
"""The baselines use neither slack nor pressure, and serve and train separately."""
OWN_LENGTHS = Need("load.trace.lengths", but=("trace",))
TRACE_LENGTHS = Need("load.trace.lengths", among=("trace",))
SAMPLES = Need("load.temperature", but=(0.0,))
GPU = Need("model.device", but=("cpu",))
CPU = Need("model.device", but=("cuda",))
FEEDBACK = Need("jobs.allow_feedback", among=(True,))
SEVERAL_RANKS = Either((Need("layout.tp_size", but=(1,)), Need("layout.replica_gpus", but=(None,))))

Needs = tuple[Need | Either, ...]
ALWAYS: Needs = ()
RELEVANCE: dict[str, Needs] = {
    "run.name": ALWAYS,
    "run.out_dir": ALWAYS,
    "run.seed": ALWAYS,
    "run.max_s": ALWAYS,
    "run.linger_s": (TRAINS,),
    "run.drain_s": ALWAYS,
    "run.status": ALWAYS,
    "run.rebuilds": ALWAYS,
    "run.resume": ALWAYS,
    "run.mode": ALWAYS,
    "run.training_share": (Need("run.mode", among=("time_slice",)), REQUESTS),
    "run.trainers": (Need("run.mode", among=("split",)),),
    "layout.replicas": ALWAYS,
    "layout.tp_size": ALWAYS,
    "layout.replica_gpus": ALWAYS,
    "layout.across_hosts": (SEVERAL_RANKS,),
    "dist.backend": ALWAYS,
    "dist.timeout_s": ALWAYS,
    "dist.ranks_per_gpu": (GPU,),
    "dist.threads_per_rank": ALWAYS,
    "dist.control_host": ALWAYS,
    "dist.secret_file": ALWAYS,
    "model.path": ALWAYS,
    "model.dtype": ALWAYS,
    "model.weight_dtype": ALWAYS,
    "model.device": ALWAYS,
    "model.max_context": ALWAYS,
    "adapter.r": ALWAYS,
    "adapter.lora_alpha": ALWAYS,
    "adapter.target_modules": ALWAYS,
    "adapter.serving_slots": (Either((TRAINS, ONLINE)),),
    "engine.max_batch": (SERVES,),
    "engine.kv_tokens": ALWAYS,
    "engine.kv_dtype": ALWAYS,
    "engine.block_size": (SERVES,),
    "engine.prefix_reuse": (SERVES,),
    "engine.prepack_weights": (CPU, Need("model.dtype", among=("auto", "bfloat16"))),
    "engine.cpu_kernels": (CPU,),
    "engine.lora_kernel": ALWAYS,
    "engine.decode_kernel": (SERVES,),
    "engine.max_prefill_tokens": (SERVES,),
    "engine.overlap": (SERVES,),
    "engine.graphs": (GPU,),
    "engine.coserving": (TRAINS, REQUESTS, ADAPTS),
    "engine.slice_ms": (TRAINS,),
    "engine.concurrent_slice_ms": (
        TRAINS,
        REQUESTS,
        ADAPTS,
        Need("engine.coserving", among=("auto", "concurrent")),
        Need("layout.tp_size", among=(1,)),
    ),
    "engine.activation_mib": (TRAINS,),
    "engine.eval_tokens": (Either((DATA, ONLINE)),),
    "engine.emulated": ALWAYS,
    "slo.ttft_ms": (REQUESTS,),
    "slo.tpot_ms": (REQUESTS,),
    "slo.deadline_ms": (REQUESTS,),
    "slo.margin": (TRAINS, REQUESTS, ADAPTS),
    "slo.late": (REQUESTS, Need("slo.deadline_ms", but=(None,))),
    "data.path": ALWAYS,
    "data.train_split": (TRAINS,),
    "data.heldout_split": (DATA,),
    "data.heldout_share": (DATA,),
    "data.heldout_rows": (DATA,),
    "data.shard": (TRAINS,),
    "data.max_sample_tokens": (Either((DATA, ONLINE)),),
    "train.enabled": ALWAYS,
    "train.lr": (TRAINS,),
    "train.weight_decay": (TRAINS,),
    "train.warmup_steps": (TRAINS,),
    "train.clip_norm": (TRAINS,),
    "train.micro_batch": (TRAINS,),
    "train.max_micro_batch": (TRAINS, ADAPTS),
    "train.accumulation": (TRAINS,),
    "train.replay": (TRAINS, ONLINE),
    "federation.rounds": (TRAINS,),
    "federation.local_steps": (TRAINS,),
    "federation.min_members": (TRAINS,),
    "federation.round_timeout_s": (TRAINS,),
    "federation.settle_timeout_s": (TRAINS,),
    "federation.tolerance": (TRAINS,),
    "federation.half_steps": (TRAINS,),
    "federation.strategy": (TRAINS,),
    "control.period_s": ALWAYS,
    "control.report_s": ALWAYS,
    "control.lost_after_s": ALWAYS,
    "control.retries": (SERVES,),
    "control.idle_below": (TRAINS, ADAPTS),
    "control.serving_above": (TRAINS, ADAPTS),
    "control.hold_s": (TRAINS,),
    "control.smoothing_s": (TRAINS, ADAPTS),
    "control.window_s": (TRAINS, REQUESTS, ADAPTS),
    "control.medium_share": (TRAINS, REQUESTS, ADAPTS),
    "control.high_below": (TRAINS, REQUESTS, ADAPTS),
    "control.medium_below": (TRAINS, REQUESTS, ADAPTS),
    "control.reference_batch": (TRAINS, ADAPTS),
    "jobs.max_jobs": (
        TRAINS,
        ONLINE,
    ),
    "jobs.max_files": (TRAINS, ONLINE),
    "jobs.max_jobs_per_key": (TRAINS, ONLINE),
    "jobs.max_files_per_key": (TRAINS, ONLINE),
    "jobs.max_adapters_per_key": (TRAINS, ONLINE),
    "jobs.max_files_gib": (TRAINS, ONLINE),
    "jobs.min_free_gib": (TRAINS, ONLINE),
    "jobs.max_rows": (TRAINS, ONLINE),
    "jobs.heldout_share": (
        TRAINS,
        ONLINE,
    ),
    "jobs.own_weight": (TRAINS, ONLINE, DATA),
    "jobs.allow_feedback": (
        TRAINS,
        ONLINE,
    ),
    "jobs.feedback_rows": (TRAINS, ONLINE, FEEDBACK),
    "jobs.feedback_wait_s": (TRAINS, ONLINE, FEEDBACK),
    "jobs.feedback_epochs": (TRAINS, ONLINE, FEEDBACK),
    "jobs.max_feedback": (TRAINS, ONLINE, FEEDBACK),
    "jobs.feedback_quota": (TRAINS, ONLINE, FEEDBACK),
    "jobs.feedback_answers": (TRAINS, ONLINE, FEEDBACK),
    "jobs.feedback_ttl_s": (TRAINS, ONLINE, FEEDBACK),
    "load.kind": ALWAYS,
    "load.rate_rps": (GENERATED,),
    "load.cv": (Need("load.kind", among=("gamma",)),),
    "load.duration_s": (LOAD,),
    "load.max_requests": (LOAD,),
    "load.split": (LOAD,),
    "load.max_tokens": (LOAD, OWN_LENGTHS),
    "load.temperature": (LOAD,),
    "load.top_p": (LOAD, SAMPLES),
    "load.top_k": (LOAD, SAMPLES),
    "load.ignore_eos": (LOAD, OWN_LENGTHS),
    "load.trace.path": (TRACE,),
    "load.trace.format": (TRACE,),
    "load.trace.speed": (TRACE,),
    "load.trace.start_s": (TRACE,),
    "load.trace.lengths": (TRACE,),
    "load.trace.prompt_scale": (TRACE_LENGTHS,),
    "load.trace.answer_scale": (TRACE_LENGTHS,),
    "load.trace.max_prompt_tokens": (TRACE_LENGTHS,),
    "load.trace.max_answer_tokens": (TRACE_LENGTHS,),
    "quality.exact_match_rows": ALWAYS,
    "quality.max_tokens": (PROBES,),
    "quality.metrics": (PROBES,),
    "quality.earlier_versions": (PROBES, TRAINS),
    "quality.code_language": (PROBES,),
    "quality.test_command": (PROBES,),
    "quality.test_timeout_s": (PROBES, Need("quality.test_command", but=((),))),
    "metrics.flush_s": ALWAYS,
    "metrics.flush_rows": ALWAYS,
    "metrics.device_s": ALWAYS,
    "metrics.answers": (REQUESTS,),
    "serve.http.port": ALWAYS,
    "serve.http.host": (ONLINE,),
    "serve.http.keys_file": (ONLINE,),
    "serve.http.max_waiting": (ONLINE,),
    "serve.http.max_running": (ONLINE,),
    "serve.http.max_body_mib": (ONLINE,),
    "serve.http.max_file_mib": (ONLINE,),
    "serve.http.max_tokens": (ONLINE,),
    "serve.http.default_max_tokens": (ONLINE,),
    "serve.http.max_n": (ONLINE,),
    "serve.http.timeout_s": (ONLINE,),
    "serve.http.stall_s": (ONLINE,),
    "serve.adapter_root": (ONLINE,),
}
"""A field has an effect if all of its needs are met. A test checks that every field has its line here."""


def value_of(config: object, field: str) -> Any:
    """Value of a field, named as in load.kind; None within an omitted section."""
    for part in field.split("."):
        config = None if config is None else getattr(config, part)
    return config


def check_relevance(config: object, origins: Mapping[KeyPath, Origin]) -> list[str]:
    """Lines to log about fields that overrides have left without effect.

    origins: of all given values. Raises ConfigError, a line for each cause, for given fields without effect.
    """
    refused: dict[str, list[str]] = {}
    notes: dict[str, list[str]] = {}
    for field, origin in _given_fields(config, origins):
        unmet = [need for need in RELEVANCE[field] if not need.met(config)]
        if not unmet:
            continue
        switches = _switches(unmet, origins)
        if not origin.override and switches is not None:
            notes.setdefault(switches, []).append(field)
        else:
            refused.setdefault(_complaint(unmet, config), []).append(f"{field} ({origin.where})")
    if refused:
        raise ConfigError("\n".join(f"{', '.join(names)}: {why}" for why, names in refused.items()))
    return [f"without effect under {switches}: {', '.join(fields)}" for switches, fields in notes.items()]


def check_device(config: object, device: str) -> None:
    """The check that model.device=auto allows only once the device is known. Raises ConfigError."""
    share = value_of(config, "dist.ranks_per_gpu")
    if device == "cpu" and share > 1:
        raise ConfigError(f"dist.ranks_per_gpu {share}: no effect on a CPU, and there is no GPU here: remove it")


def _given_fields(config: object, origins: Mapping[KeyPath, Origin]) -> Iterator[tuple[str, Origin]]:
    for field in RELEVANCE:
        key_path = tuple(field.split("."))
        origin = origins.get(key_path)
        # null removes a value: there is nothing to check.
        if origin is not None and not origin.taken_back and value_of(config, field) is not None:
            yield field, origin


def _switches(unmet: list[Need | Either], origins: Mapping[KeyPath, Origin]) -> str | None:
    """The overrides that leave all of these needs unmet; None if one is unmet without any override."""
    found = []
    for need in unmet:
        parts = need.needs if isinstance(need, Either) else (need,)
        known = [origins.get(tuple(part.field.split("."))) for part in parts]
        overrides = [origin.where for origin in known if origin is not None and origin.override]
        if not overrides:
            return None
        found += overrides
    return ", ".join(dict.fromkeys(found))


def _complaint(unmet: list[Need | Either], config: object) -> str:
    needs = [part for need in unmet for part in (need.needs if isinstance(need, Either) else (need,))]
    present = dict.fromkeys(f"{need.field} is {_shown(value_of(config, need.field))}" for need in needs)
    wanted = ", and ".join(map(str, unmet))
    return f"no effect while {' and '.join(present)}, needs {wanted}: remove or change the latter"


def _listed(values: tuple[Any, ...]) -> str:
    shown = [_shown(value) for value in values]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"


def _shown(value: Any) -> str:
    """As it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if value == ():
        return "[]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
