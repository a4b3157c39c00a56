"""Promise 7: a field that was given and cannot matter is refused, in files and in overrides."""

from __future__ import annotations

import json
import logging
import re
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from config_fields import fields

from clif.config import Config, ConfigError, load_config
from clif.config.given import Origin
from clif.config.relevance import ALWAYS, RELEVANCE, Either, Need, check_device, check_relevance, value_of

SERVE_ONLY = {"train": {"enabled": False}}


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    return str(path)


def write(tmp_path: Path, rows: str, sections: dict[str, Any]) -> Path:
    """A file that serves and trains, with more sections."""
    tree: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": rows}, "load": {"kind": "poisson"}}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def allowed_values(kind: Any) -> tuple[Any, ...]:
    """Of a field that is one of several words."""
    return tuple(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else get_args(kind)


# --- the table -----------------------------------------------------------------------------------


def test_the_table_names_fields_and_values_that_there_are():
    known = fields()
    for needs in RELEVANCE.values():
        for need in (part for n in needs for part in (n.needs if isinstance(n, Either) else (n,))):
            allowed = allowed_values(known[need.field].annotation)
            strings = {value for value in (*need.among, *need.but) if isinstance(value, str)}
            assert strings <= set(allowed), need
            assert bool(need.among) != bool(need.but), need


def test_what_a_field_needs_never_needs_the_field():
    """Else neither could be given."""
    for field, needs in RELEVANCE.items():
        for need in needs:
            assert not (isinstance(need, Need) and field in str(RELEVANCE[need.field])), field


MEETS = {
    "load.kind": "gamma",
    "quality.exact_match_rows": 1,
    "slo.deadline_ms": 100.0,
    "layout.tp_size": 2,
    "load.temperature": 1.0,
    "model.device": "auto",
    "load.trace.lengths": "data",
    "serve.http.port": 8000,
    "quality.test_command": ["run", "{program}"],
}
"""A value with which a need is met that names only the others."""
EXAMPLES = {
    "slo.deadline_ms": 50.0, "load.max_requests": 5, "data.heldout_share": 0.5, "data.heldout_rows": 1,
    "load.trace.max_prompt_tokens": 5, "load.trace.max_answer_tokens": 5, "federation.rounds": 1,
    "load.trace.path": __file__, "serve.http.keys_file": "keys", "serve.http.max_tokens": 64,
    "serve.http.default_max_tokens": 64, "serve.adapter_root": "adapters",
}  # fmt: skip
"""Something to give to a field whose default is nothing."""
NEEDY = [field for field, needs in RELEVANCE.items() if needs != ALWAYS]


def wishes(field: str) -> dict[str, Any]:
    """Overrides that give a field something, and all that it needs."""
    given: dict[str, Any] = {}
    for need in RELEVANCE[field]:
        part = need.needs[0] if isinstance(need, Either) else need
        if part.field != "data.path":
            given[part.field] = MEETS[part.field] if part.but else part.among[-1]
    if field.startswith("load.trace.") or given.get("load.kind") == "trace" or given.get("load.trace.lengths"):
        given |= {"load.kind": "trace", "load.trace.path": __file__}
    default = fields()[field].default
    return given | {field: EXAMPLES.get(field, str(default) if isinstance(default, Path) else default)}


def as_overrides(given: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{field}={json.dumps(value)}" for field, value in given.items())


@pytest.mark.parametrize("field", NEEDY)
def test_a_field_is_accepted_with_all_that_it_needs(tmp_path, rows, field):
    """So no field needs what excludes each other."""
    given = wishes(field)
    config = load_config(write(tmp_path, rows, {}), as_overrides(given))
    assert all(need.met(config) for need in RELEVANCE[field])


def without(config: Config, need: Need) -> Config:
    """The same with a value that does not meet a need, whether such a whole would be accepted or not."""
    section, _, field = need.field.partition(".")
    if "." in field:
        inner, _, field = field.partition(".")
        outer = getattr(config, section)
        part = getattr(outer, inner).model_copy(update={field: (*need.but, "data")[0]})
        return config.model_copy(update={section: outer.model_copy(update={inner: part})})
    allowed = allowed_values(fields()[need.field].annotation) or (False, 2)
    wrong = need.but[0] if need.but else next(value for value in allowed if value not in need.among)
    return config.model_copy(update={section: getattr(config, section).model_copy(update={field: wrong})})


@pytest.mark.parametrize("field", NEEDY)
def test_a_field_is_refused_as_soon_as_one_of_its_needs_is_not_met(tmp_path, rows, field):
    accepted = load_config(write(tmp_path, rows, {}), as_overrides(wishes(field)))
    origins = {tuple(field.split(".")): Origin("here")}
    assert not check_relevance(accepted, origins)
    for need in RELEVANCE[field]:
        config = accepted
        for part in need.needs if isinstance(need, Either) else (need,):
            config = without(config, part)
        with pytest.raises(ConfigError, match=rf"^{re.escape(field)} \(here\): no effect while .*needs "):
            check_relevance(config, origins)


# --- what is refused -----------------------------------------------------------------------------

WITHOUT_EFFECT = [
    ({"run": {"mode": "time_slice"}, "engine": {"coserving": "fused"}}, "engine.coserving", "run.mode is time_slice"),
    ({"load": {"top_p": 0.5}}, "load.top_p", "load.temperature is 0"),
    ({"load": {"top_k": 5}}, "load.top_k", "load.temperature is 0"),
    ({"load": {"cv": 2.0}}, "load.cv", "load.kind is poisson"),
    ({"load": {"kind": "trace", "trace": {"path": __file__}, "rate_rps": 2}}, "load.rate_rps", "load.kind is trace"),
    ({"load": {"kind": "trace", "trace": {"path": __file__}, "cv": 2}}, "load.cv", "load.kind is trace"),
    (
        {"load": {"kind": "trace", "trace": {"path": __file__, "lengths": "trace"}, "max_tokens": 9}},
        "load.max_tokens",
        "load.trace.lengths is trace",
    ),
    *(
        ({"load": {"kind": "trace", "trace": {"path": __file__, name: 2}}}, f"load.trace.{name}", "lengths is data")
        for name in ("prompt_scale", "answer_scale", "max_prompt_tokens", "max_answer_tokens")
    ),
    ({**SERVE_ONLY, "train": {"enabled": False, "lr": 0.1}}, "train.lr", "train.enabled is false"),
    ({**SERVE_ONLY, "federation": {"local_steps": 3}}, "federation.local_steps", "train.enabled is false"),
    ({**SERVE_ONLY, "federation": {"min_members": 9}}, "federation.min_members", "train.enabled is false"),
    ({**SERVE_ONLY, "data": {"shard": "client"}}, "data.shard", "train.enabled is false"),
    ({**SERVE_ONLY, "engine": {"slice_ms": 20}}, "engine.slice_ms", "train.enabled is false"),
    ({"run": {"mode": "split"}, "control": {"idle_below": 0.5}}, "control.idle_below", "run.mode is split"),
    ({"run": {"mode": "split"}, "control": {"medium_share": 0.2}}, "control.medium_share", "run.mode is split"),
    ({"run": {"mode": "time_slice"}, "control": {"high_below": 0.2}}, "control.high_below", "run.mode is time_slice"),
    ({"run": {"mode": "split"}, "control": {"reference_batch": 2}}, "control.reference_batch", "run.mode is split"),
    ({"run": {"mode": "split"}, "train": {"max_micro_batch": 9}}, "train.max_micro_batch", "run.mode is split"),
    ({"slo": {"late": "reject"}}, "slo.late", "slo.deadline_ms is null"),
    ({"quality": {"max_tokens": 9}}, "quality.max_tokens", "quality.exact_match_rows is 0"),
    ({"model": {"device": "cpu"}, "dist": {"ranks_per_gpu": 4}}, "dist.ranks_per_gpu", "model.device is cpu"),
    (
        {"engine": {"coserving": "interleaved", "concurrent_slice_ms": 9}},
        "engine.concurrent_slice_ms",
        "engine.coserving is interleaved",
    ),
    ({"run": {"training_share": 0.3}}, "run.training_share", "run.mode is clif"),
    ({"run": {"mode": "time_slice", "trainers": 2}}, "run.trainers", "run.mode is time_slice"),
    ({"load": {"kind": "none"}, "slo": {"ttft_ms": 5}}, "slo.ttft_ms", "load.kind is none"),
    ({"load": {"kind": "none"}, "engine": {"max_batch": 5}}, "engine.max_batch", "quality.exact_match_rows is 0"),
    ({"layout": {"across_hosts": True}}, "layout.across_hosts", "layout.tp_size is 1"),
    (
        {"model": {"dtype": "float32"}, "engine": {"prepack_weights": True}},
        "engine.prepack_weights",
        "model.dtype is float32",
    ),
]


@pytest.mark.parametrize(("sections", "field", "why"), WITHOUT_EFFECT, ids=[case[1] for case in WITHOUT_EFFECT])
def test_what_a_file_gives_and_cannot_matter_is_refused(tmp_path, rows, sections, field, why):
    path = write(tmp_path, rows, sections)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    said = str(refused.value)
    assert re.match(rf"{re.escape(field)} \({re.escape(str(path))}, line \d+\): no effect while ", said)
    assert why in said and ": remove or change the latter" in said and "\n" not in said


@pytest.mark.parametrize(("sections", "field", "why"), WITHOUT_EFFECT, ids=[case[1] for case in WITHOUT_EFFECT])
def test_what_overrides_give_and_cannot_matter_is_refused(tmp_path, rows, sections, field, why):
    overrides = [f"{name}.{key}={json.dumps(value)}" for name, keys in sections.items() for key, value in keys.items()]
    with pytest.raises(ConfigError) as refused:
        load_config(write(tmp_path, rows, {}), tuple(overrides))
    said = str(refused.value)
    assert said.startswith(f'{field} (override "') and why in said


def test_an_override_that_cannot_matter_in_the_file_is_refused(tmp_path, rows):
    path = write(tmp_path, rows, SERVE_ONLY)
    with pytest.raises(
        ConfigError, match=r'^train\.lr \(override "train\.lr=1"\): no effect while train\.enabled is f'
    ):
        load_config(path, ("train.lr=1",))


def test_a_whole_section_without_effect_is_one_sentence(tmp_path, rows):
    path = write(tmp_path, rows, {"train": {"enabled": False, "lr": 0.1, "micro_batch": 2, "clip_norm": 1}})
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert re.match(
        r"train\.lr \(.*\), train\.clip_norm \(.*\), train\.micro_batch \(.*\): no effect", str(refused.value)
    )
    assert "\n" not in str(refused.value)


# --- what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["clif", "serve_only", "train_only", "time_slice", "split"])
def test_defaults_that_cannot_matter_stay_silent(tmp_path, rows, mode, caplog):
    sections = {"run": {"mode": mode}, "train": {"enabled": mode != "serve_only"}}
    with caplog.at_level(logging.INFO):
        load_config(write(tmp_path, rows, {**sections, **({"load": {"kind": "none"}} if mode == "train_only" else {})}))
    assert not caplog.messages


def test_an_override_that_switches_off_tells_what_of_the_file_it_leaves_without_effect(tmp_path, rows, caplog):
    path = write(
        tmp_path,
        rows,
        {"train": {"lr": 0.1}, "control": {"hold_s": 2}, "quality": {"max_tokens": 9}}
        | {"quality": {"exact_match_rows": 1, "max_tokens": 9}},
    )
    with caplog.at_level(logging.INFO):
        config = load_config(path, ("train.enabled=false", "quality.exact_match_rows=0"))
    assert not config.train.enabled
    assert caplog.messages == [
        'without effect under override "train.enabled=false": train.lr, control.hold_s',
        'without effect under override "quality.exact_match_rows=0": quality.max_tokens',
    ]


def test_an_override_excuses_only_what_it_switches_off(tmp_path, rows):
    """The file gave top_p without a temperature before anybody touched the load."""
    path = write(tmp_path, rows, {"load": {"top_p": 0.5}})
    with pytest.raises(
        ConfigError, match=r"^load\.top_p \(.*line \d+\): no effect while load\.kind is none and load\.tem"
    ):
        load_config(path, ("load.kind=none",))


def test_a_share_of_a_gpu_is_refused_where_auto_finds_only_a_cpu(tmp_path, rows):
    config = load_config(write(tmp_path, rows, {"dist": {"ranks_per_gpu": 2}}))
    check_device(config, "cuda")
    with pytest.raises(ConfigError, match=r"^dist\.ranks_per_gpu 2: no effect on a CPU, .*: remove it"):
        check_device(config, "cpu")


def test_a_section_that_an_override_takes_back_is_a_switch_too(tmp_path, rows, caplog):
    path = write(tmp_path, rows, {"load": {"cv": 2, "kind": "gamma"}, "slo": {"ttft_ms": 5}})
    with caplog.at_level(logging.INFO):
        assert load_config(path, ("load=null",)).load.kind == "none"
    assert caplog.messages == ['without effect under override "load=null": slo.ttft_ms']
    with pytest.raises(ConfigError, match=r'^load\.cv \(override "load\.cv=3"\): no effect while load\.kind is none'):
        load_config(path, ("load=null", "load.cv=3"))


def test_null_takes_a_wish_back(tmp_path, rows):
    path = write(tmp_path, rows, {"load": {"kind": "none"}})
    assert load_config(path, ("slo.deadline_ms=null", "load.max_requests=null")).slo.deadline_ms is None


@pytest.mark.parametrize("mode", ["serve_only", "split"])
def test_config_json_gives_everything_and_is_read_back(tmp_path, rows, mode):
    config = load_config(write(tmp_path, rows, {"run": {"mode": mode}, "train": {"enabled": mode == "split"}}))
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_values_are_found_by_their_name(tmp_path, rows):
    config = load_config(write(tmp_path, rows, {}))
    assert value_of(config, "load.kind") == "poisson" and value_of(config, "load.trace.speed") is None
