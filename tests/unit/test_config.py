"""Promise 7: no configuration is silently ignored. What cannot be honoured is an error that says what to change."""

from __future__ import annotations

import random
from pathlib import Path

import pydantic
import pytest
import yaml
from config_fields import fields

from clif.config import Config, ConfigError, config_from_tree, load_config
from clif.config.relevance import RELEVANCE
from clif.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"model": {"path": "m"}, "train": {"enabled": False}}
"""The least that is accepted: no training, no load, no data."""
TRAINS = {"train": {"enabled": True}, "data": {"path": __file__}}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(ALONE))
    return path


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("")
    return str(path)


@pytest.fixture
def busy(tmp_path, rows) -> Path:
    """A file that serves and trains: nearly every field matters."""
    path = tmp_path / "busy.yaml"
    path.write_text(yaml.safe_dump({"model": {"path": "m"}, "data": {"path": rows}, "load": {"kind": "poisson"}}))
    return path


def merged(**sections) -> dict:
    """ALONE with more sections; model keeps its path."""
    tree = {name: dict(values) for name, values in ALONE.items()}
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    return tree


def refusal(tree: dict) -> str:
    with pytest.raises(ConfigError) as refused:
        config_from_tree(tree)
    assert isinstance(refused.value, InputError), "shown without a traceback"
    return str(refused.value)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections, sentence",
    [
        ({"engine": {"kv_token": 1}}, "unknown key engine.kv_token: remove it or correct its spelling (known: max_b"),
        ({"engine": {"coserving": "both"}}, "engine.coserving: Input should be 'auto', 'fused', 'concurrent' or 'int"),
        ({"engines": {}}, "unknown key engines: remove it or correct its spelling (known: run, layout, dist, model"),
        ({"engine": {"max_batch": 0}}, "engine.max_batch: Input should be greater than 0 (given: 0)"),
        ({"engine": {"max_batch": "many"}}, "engine.max_batch: Input should be a valid integer"),
        ({"slo": {"margin": 1.5}}, "slo.margin: Input should be less than or equal to 1 (given: 1.5)"),
        ({"model": {"dtype": "int8"}}, "model.dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"adapter": {"serving_slots": 1}}, "adapter.serving_slots: Input should be greater than or equal to 2"),
        ({"engine": {"kv_tokens": "many"}}, "engine.kv_tokens is 'many': it must be a whole number above 0, or auto"),
        ({"engine": {"kv_tokens": 0}}, "engine.kv_tokens is 0: it must be a whole number above 0, or auto"),
        ({"engine": {"kv_tokens": 8200}}, "engine.kv_tokens 8200 is not a multiple of engine.block_size 16"),
        (
            {"control": {"idle_below": 0.9, "serving_above": 0.9}},
            "control.idle_below 0.9 must be under control.serving_above 0.9",
        ),
        (
            {"control": {"high_below": 0.9, "medium_below": 0.8}},
            "control.high_below 0.9 must not exceed control.medium_below 0.8",
        ),
        (
            {"train": {"micro_batch": 9}},
            "train.micro_batch 9 exceeds train.max_micro_batch 8: raise the latter",
        ),
        ({"load": {"kind": "trace"}}, 'load.kind "trace" and the section load.trace need each other'),
        (
            {"load": {"kind": "poisson", "trace": {"path": __file__}}},
            'load.kind "trace" and the section load.trace need each other: give both or neither',
        ),
        ({"data": {"path": "assets/none.jsonl"}}, "data.path assets/none.jsonl does not exist: run `clif fetch`"),
        ({"data": {"path": "none.jsonl"}}, "data.path none.jsonl does not exist: correct it"),
        ({"train": {"enabled": True}}, "train.enabled need instruction data: set data.path"),
        ({"load": {"kind": "poisson"}}, "load.kind need instruction data: set data.path"),
        ({"quality": {"exact_match_rows": 4}}, "quality.exact_match_rows need instruction data: set data.path"),
        (
            {"run": {"mode": "fast"}},
            "run.mode: Input should be 'clif', 'serve_only', 'train_only'",
        ),
        (
            {**TRAINS, "run": {"mode": "serve_only"}},
            "run.mode serve_only does not train: set train.enabled=false or change run.mode",
        ),
        ({"run": {"mode": "train_only"}}, "run.mode train_only trains but train.enabled is false: change one of them"),
        ({"run": {"mode": "split"}}, "run.mode split trains but train.enabled is false: change one of them"),
        (
            {**TRAINS, "run": {"mode": "train_only"}, "load": {"kind": "poisson"}},
            "run.mode train_only takes no load: set load.kind=none, not poisson",
        ),
        ({"run": {"training_share": 1.5}}, "run.training_share: Input should be less than or equal to 1"),
        ({"federation": {"rounds": 2}}, "federation.rounds asks for rounds but train.enabled is false: change one"),
        (
            {"model": {"max_context": 9000}},
            "model.max_context 9000 does not fit engine.kv_tokens 8192: one request of full length must fit",
        ),
        ({"layout": {"replica_gpus": [[0, "x"]]}}, "layout.replica_gpus.0.1: Input should be a valid integer"),
        ({"engine": 5}, "engine: Input should be a valid dictionary"),
        (
            {"run": {"name": "/abs/x"}},
            "run.name must be one folder's name of letters, digits and . _ - = + @, beginning",
        ),
        ({"run": {"name": "."}}, "run.name must be one folder's name"),
        ({"run": {"name": ".."}}, "run.name must be one folder's name"),
        ({"run": {"name": "a/b"}}, "run.name must be one folder's name"),
        ({"run": {"name": "-x"}}, "run.name must be one folder's name"),
        ({"run": {"name": "n" * 300}}, "run.name has 300 bytes: give at most 100"),
        ({"run": {"name": 2026}}, "run.name: Input should be a valid string (given: 2026): write it in quotes"),
        ({"run": {"name": " "}}, "run.name is empty: give a value or leave it out"),
        ({"run": {"out_dir": "~/runs"}}, "run.out_dir begins with ~, which only a shell knows: write the path out"),
        ({"data": {"path": "~/rows.jsonl"}}, "data.path begins with ~, which only a shell knows: write the path out"),
        ({"run": {"out_dir": "x" * 5000}}, "run.out_dir has 5000 characters: give at most 4096"),
        ({"data": {"train_split": "a\x1b[31m"}}, "data.train_split holds a control character or half a character"),
        ({"run": {"seed": -1}}, "run.seed: Input should be greater than or equal to 0 (given: -1)"),
        ({"run": {"seed": 10**30}}, "run.seed: Input should be less than 9223372036854775808"),
        ({"run": {"status": False}}, "run.status is false: give a value, not true or false"),
        ({"dist": {"timeout_s": 2.0**63}}, "dist.timeout_s: Input should be less than or equal to 1000000"),
        ({"control": {"report_s": 1e9}}, "control.report_s: Input should be less than or equal to 3600"),
        (
            {"control": {"report_s": 30}},
            "control.report_s 30 must be under control.lost_after_s 20: every replica would be lost",
        ),
        ({"layout": {"replicas": 1000, "tp_size": 1000}}, "layout asks for 1000000 ranks: lower layout.replicas or"),
        ({"adapter": {"target_modules": "[a-z"}}, "adapter.target_modules '[a-z' is not a regular expression"),
        ({"adapter": {"target_modules": ["q", "q"]}}, "adapter.target_modules lists a name twice: remove one"),
        ({"adapter": {"target_modules": [1]}}, 'adapter.target_modules must be "all-linear", a regular expression, or'),
        (
            {**TRAINS, "run": {"linger_s": 0}},
            "train.enabled is true but there is no time to train: without load rounds",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_what_to_change(sections, sentence):
    said = refusal(merged(**sections))
    assert said.startswith(sentence)
    assert "pydantic" not in said and "\n" not in said, "one sentence per mistake"


def test_a_missing_model_path_is_named():
    assert refusal({"train": {"enabled": False}, "model": {}}) == "model.path is required: add it"
    assert refusal({"train": {"enabled": False}}) == "model is required: add it"


def test_every_mistake_is_named_at_once():
    said = refusal(merged(engine={"max_batch": 0, "typo": 1}, slo={"margin": 2})).splitlines()
    assert len(said) == 3
    assert any("engine.max_batch" in s for s in said) and any("engine.typo" in s for s in said)
    assert any("slo.margin" in s for s in said)


def test_an_unknown_key_of_an_optional_section_is_refused_too():
    trace = {"kind": "trace", "trace": {"path": __file__, "sped": 2}}
    assert refusal(merged(load=trace)).startswith("unknown key load.trace.sped: remove it or correct its spelling")


def test_a_missing_trace_file_is_refused(rows):
    load = {"kind": "trace", "trace": {"path": "none.csv"}}
    said = refusal(merged(load=load, data={"path": rows}))
    assert said == "load.trace.path none.csv does not exist: correct it"


# --- files and overrides -------------------------------------------------------------------------


def test_the_defaults_are_accepted_as_they_are(file):
    config = load_config(file)
    assert config.model.path == "m" and config.engine.max_batch == 16
    assert config.run_dir == Path("runs/run")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*: Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("model: [", "is not valid YAML"),
        ("model: {path: m\n\tx: 1}", "is not valid YAML"),
        ("engine: {max_batch: 3}\nengine: {kv_tokens: 4096}\n", "is not valid YAML: engine is given twice"),
        ("- model", "must be a mapping of sections, not a list"),
        ("model", "must be a mapping of sections, not a str"),
        ("", "model is required: add it"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, sentence):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_config(path)


def test_a_file_that_is_no_text_is_refused_with_a_sentence(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\xff\xfe\x80")
    with pytest.raises(ConfigError, match=r"model\.gguf is not a text file: name a YAML file"):
        load_config(path)


@pytest.mark.parametrize("key", ["1", "null", "[a]", "true"])
def test_keys_that_are_no_names_are_refused(tmp_path, key):
    path = tmp_path / "c.yaml"
    for text in (f"{key}: 2\n", f"engine: {{{key}: 2}}\n"):
        path.write_text(yaml.safe_dump(ALONE) + text)
        with pytest.raises(ConfigError, match=r"a key is no name: write section: and key: value.*line 5, column"):
            load_config(path)


def test_a_file_without_end_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match=r"/dev/zero is larger than 64 KiB: name a YAML file, as in configs/"):
        load_config("/dev/zero")


def test_a_refusal_names_the_file_with_its_line_or_the_override(file):
    file.write_text(yaml.safe_dump(merged(engine={"max_batch": 0})))
    with pytest.raises(ConfigError) as refused:
        load_config(file, ("slo.margin=2", "engine.kv_token=1"))
    lines = str(refused.value).splitlines()
    assert lines[0].endswith(f"(given: 0) ({file}, line 2)")
    assert lines[1].startswith("unknown key engine.kv_token") and lines[1].endswith('(override "engine.kv_token=1")')
    assert lines[2].endswith('(given: 2) (override "slo.margin=2")')


def test_a_refusal_of_what_does_not_fit_together_names_where_each_of_both_was_given(busy):
    busy.write_text(busy.read_text() + "engine: {block_size: 7}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(busy, ("engine.kv_tokens=8",))
    said = f'engine.kv_tokens 8 is not a multiple of engine.block_size 7 (override "engine.kv_tokens=8", {busy}, line '
    assert str(refused.value).startswith(said)
    busy.write_text(busy.read_text().replace("block_size: 7", "block_size: 8"))
    with pytest.raises(ConfigError) as refused:
        load_config(busy, ("train.micro_batch=9",))
    assert str(refused.value).endswith('raise the latter (override "train.micro_batch=9")')


def test_of_a_thousand_mistakes_the_first_are_told():
    said = refusal(merged(engine={f"typo{n}": 1 for n in range(1000)})).splitlines()
    assert len(said) == 21 and said[-1] == "and 980 more"


@pytest.mark.parametrize(
    "override, section, key, value",
    [
        ("engine.max_batch=3", "engine", "max_batch", 3),
        ("train.lr=1.0e-3", "train", "lr", 1e-3),
        ("train.lr=1e-3", "train", "lr", 1e-3),
        ("slo.deadline_ms=2500", "slo", "deadline_ms", 2500.0),
        ("slo.deadline_ms=null", "slo", "deadline_ms", None),
        ("engine.prepack_weights=false", "engine", "prepack_weights", False),
        ("layout.replica_gpus=[[0, 1], [2, 3]]", "layout", "replica_gpus", ((0, 1), (2, 3))),
        ("adapter.target_modules=[q_proj, v_proj]", "adapter", "target_modules", ("q_proj", "v_proj")),
        ("adapter.target_modules=all-linear", "adapter", "target_modules", "all-linear"),
        ("run.name=a=b", "run", "name", "a=b"),
        ("run.name=2026-13-45", "run", "name", "2026-13-45"),
        ("run.status=off", "run", "status", "off"),
        ("train.enabled=on", "train", "enabled", True),
        ("engine.prefix_reuse=no", "engine", "prefix_reuse", False),
        ("engine.kv_tokens=0x4000", "engine", "kv_tokens", 16384),
        ("dist.control_host=12:30", "dist", "control_host", "12:30"),
        ("model.path=random:x/config.json", "model", "path", "random:x/config.json"),
    ],
)
def test_overrides_are_read_like_yaml(busy, override, section, key, value):
    got = getattr(getattr(load_config(busy, (override,)), section), key)
    assert got == value and type(got) is type(value)


def test_an_override_reaches_into_sections_that_the_file_does_not_have(file, rows):
    overrides = ("load.kind=trace", f"load.trace.path={__file__}", "load.trace.speed=2", f"data.path={rows}")
    config = load_config(file, overrides)
    assert config.load.trace is not None
    assert (config.load.trace.speed, config.load.trace.path) == (2.0, Path(__file__))


def test_an_override_fills_a_section_that_the_file_leaves_empty(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\ntrain: {enabled: false}\nengine:\n")
    assert load_config(path, ("engine.kv_tokens=4096",)).engine.kv_tokens == 4096
    assert load_config(path).engine.kv_tokens == 8192


def test_an_override_of_a_section_keeps_its_other_fields(file):
    file.write_text(yaml.safe_dump(merged(adapter={"r": 4})))
    config = load_config(file, ("adapter={lora_alpha: 8}",))
    assert (config.adapter.r, config.adapter.lora_alpha) == (4, 8.0)


def test_null_takes_back_what_the_file_says_of_a_section(file):
    file.write_text(yaml.safe_dump(merged(adapter={"r": 4, "lora_alpha": 8})))
    assert load_config(file, ("adapter=null",)).adapter.r == 8
    # What is given beside it counts.
    config = load_config(file, ("adapter.lora_alpha=32", "adapter=null"))
    assert (config.adapter.r, config.adapter.lora_alpha) == (8, 32.0)


def test_the_order_of_overrides_never_matters(busy):
    """Which of two counts is never a question: they cannot be about the same field."""
    draw = random.Random(0)
    fields = [
        "run.seed=3",
        "train.lr=0.1",
        "engine={kv_tokens: 4096}",
        "engine.max_batch=2",
        "slo=null",
        "slo.margin=0.1",
    ]
    first = load_config(busy, tuple(fields))
    assert (first.engine.kv_tokens, first.engine.max_batch, first.slo.margin) == (4096, 2, 0.1)
    assert all(load_config(busy, tuple(draw.sample(fields, len(fields)))) == first for _ in range(20))


@pytest.mark.parametrize("key", ["slo.ttft_ms", "train.lr", "run.max_s"])
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused(file, key, value):
    with pytest.raises(ConfigError, match=f"^{key}: Input should be a finite number"):
        load_config(file, (f"{key}={value}",))


@pytest.mark.parametrize(
    "overrides", [("model.dtype=auto", "model.dtype=float32"), ("model.dtype=auto", "model={dtype: float32}")]
)
def test_an_override_given_twice_is_refused(file, overrides):
    with pytest.raises(ConfigError) as refused:
        load_config(file, overrides)
    assert str(refused.value) == f'model.dtype is given twice, by "{overrides[0]}" and "{overrides[1]}": remove one'


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("engine.max_batch", '"engine.max_batch" is not an override: write section.key=value'),
        ("=3", '"=3" is not an override'),
        ("engine.=3", '"engine.=3" is not an override'),
        (".max_batch=3", "is not an override"),
        ("engine.max_batch=[1", "the value is not valid YAML"),
        ("model.path.x=1", 'model.path.x=1": path is a value, not a section'),
        ("engine.max_bach=3", "unknown key engine.max_bach"),
        ("engin.max_batch=3", "unknown key engin"),
        ("engine.max_batch=", "engine.max_batch: Input should be a valid integer"),
        ("engine.max_batch=true", "engine.max_batch is true: give a value, not true or false"),
        ("engine.max_batch=yes", "engine.max_batch: Input should be a valid integer"),
        ("run.seed=!!int x", "the value is not valid YAML: tags, as in !!int, are not read: leave them out"),
        ("run.name=!!timestamp x", "tags, as in !!int, are not read"),
        ("run.resume=!!bool x", "tags, as in !!int, are not read"),
        ("run=!!map [a]", "tags, as in !!int, are not read"),
        ("run.name=&a [*a]", "anchors and aliases are not read: write the value out"),
        ("run.name=" + "[" * 100_000, "values are nested more than 20 deep"),
        ("run.seed=" + "9" * 5000, "a number of 5000 characters"),
        ('run.name="\\ud83d"', "text with a control character or half a character: remove it"),
        ('run.name="\\U00110000"', "a character or number out of range"),
        ("run.name=\x00", "unacceptable character"),
        ("slo={ttft_ms: 1, ttft_ms: 2}", "the value is not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused(file, override, sentence):
    with pytest.raises(ConfigError) as refused:
        load_config(file, (override,))
    assert sentence in str(refused.value)


# --- what was read -------------------------------------------------------------------------------


def test_values_never_change_after_reading(file):
    config = load_config(file)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.engine.max_batch = 3  # type: ignore[misc]
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.engine = config.engine  # type: ignore[misc]


def test_the_control_process_reads_back_what_rank_0_wrote_down(busy):
    """config.json carries the configuration from rank 0 to the control process."""
    config = load_config(
        busy,
        ("layout.replica_gpus=[[0,1]]", "adapter.target_modules=[q_proj]", "slo.deadline_ms=9"),
    )
    assert Config.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_the_configurations_that_come_with_clif_are_accepted(path, rows):
    tree = yaml.safe_load(path.read_text())
    overrides = [f"data.path={rows}"] if "data" in tree else []
    if (tree.get("load") or {}).get("trace"):
        overrides.append(f"load.trace.path={rows}")
    config = load_config(path, tuple(overrides))
    named = Path(config.model.path.removeprefix("random:"))
    assert named.parts[0] != "configs" or (ROOT / named).is_file()


@pytest.mark.parametrize(
    "name, field", [(n, f) for n, s in Config.model_fields.items() for f in s.annotation.model_fields]
)
def test_every_time_and_size_names_its_unit(name, field):
    """Seconds end in _s, milliseconds in _ms: a bare "timeout" or "period" would leave the unit open."""
    vague = ("timeout", "period", "interval", "duration", "delay")
    assert not field.endswith(vague)


# --- what is said about it -----------------------------------------------------------------------


def test_every_field_has_its_line_in_the_table_of_what_matters_when():
    """Who adds a field says when it matters: in clif/config/relevance.py."""
    assert RELEVANCE.keys() == fields().keys()
