"""Edges that were once wrong, or nearly: each is a promise that a user would take for granted."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import msgspec
import pytest
import safetensors
import torch
from helpers import make_rig, random_state, request
from hypothesis import given
from hypothesis import strategies as st

from clif.adapters import peft_io
from clif.adapters.peft_io import AdapterError
from clif.adapters.slots import SlotTable
from clif.config import Config, ConfigError, EngineConfig, ModelConfig, SloConfig, load_config
from clif.errors import InputError
from clif.layout import LayoutError, make_layout
from clif.models.loading import load_model
from clif.replica.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint
from clif.replica.price import may_train
from clif.replica.sampling import make_rng, sample
from clif.replica.scheduler import Scheduler, Sequence
from clif.store import CONFIG_FILE, WEIGHTS_FILE
from clif.types import Sampling
from clif.wire import messages as m

CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parents[2]


# --- layout, config
def test_a_replica_without_ranks_is_refused():
    with pytest.raises(LayoutError):
        make_layout(2, replica_gpus=((0, 1), ()))


def load(tmp_path, text, *overrides):
    f = tmp_path / "c.yaml"
    f.write_text(text)
    return load_config(f, overrides)


BASE = "model: {path: m}\ntrain: {enabled: false}\n"


def test_a_section_given_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError):
        load(tmp_path, BASE + "engine: {max_batch: 3}\nengine: {kv_tokens: 4096}\n")


def test_a_boolean_is_no_number(tmp_path):
    with pytest.raises(ConfigError):
        load(tmp_path, BASE, "engine.max_batch=yes")


@pytest.mark.parametrize("key", ["slo.ttft_ms", "train.lr", "run.max_s"])
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_not_finite_is_refused_or_survives_the_way_to_the_control_process(tmp_path, key, value):
    try:
        config = load(tmp_path, BASE, f"{key}={value}")
    except ConfigError:
        return
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_keys_that_are_no_names_are_refused(tmp_path):
    for text in ("1: 2\n", "engine: {1: 2}\n", "null: 2\n"):
        with pytest.raises(ConfigError):
            load(tmp_path, BASE + text)


# --- checkpoint: the error that safetensors itself raises
def ck(v):
    t = torch.full((1000,), float(v))
    return Checkpoint(v, 1, {"shadow": t, "moments": {"exp_avg": t + 1}, "steps": v}, {})


def test_a_real_write_error_of_safetensors_surfaces(tmp_path, monkeypatch):
    """A vanished folder (likewise a full disk): safetensors raises its own SafetensorError, which is no OSError."""
    monkeypatch.setattr(threading, "excepthook", lambda a: None)
    w = CheckpointWriter(tmp_path / "c", 0)
    (tmp_path / "c").rmdir()
    w.prepare(ck(2))
    with pytest.raises((OSError, safetensors.SafetensorError)):
        w.wait()


def test_the_error_surfaces_at_the_next_write_and_only_once(tmp_path, monkeypatch):
    w = CheckpointWriter(tmp_path, 0)
    w.prepare(ck(1))
    w.wait()
    real = safetensors.torch.save_file

    def half(t, p, meta):
        real(t, p, meta)
        p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])
        raise OSError("disk full")

    with monkeypatch.context() as c:
        c.setattr(safetensors.torch, "save_file", half)
        w.prepare(ck(2))
        with pytest.raises(OSError, match="disk full"):
            w.prepare(ck(3))
    assert load_checkpoint(w.prepared, CPU).version == 1
    w.prepare(ck(4))
    w.wait()
    assert load_checkpoint(w.prepared, CPU).version == 4


# --- price: exact edge
@given(st.floats(0, 0.2), st.floats(0, 0.2), st.floats(0, 1))
def test_the_margin_holds_at_the_exact_edge(gone, tick, margin):
    """Promise 5."""
    slo = SloConfig(ttft_ms=9e5, tpot_ms=500, margin=margin)
    seq = Sequence(request(0, [1]), 0.0, [1], last_s=0.0)
    room = slo.tpot_ms / 1000 * (1 - slo.margin) - gone - tick
    if room > 0:
        assert may_train(gone, room, tick, [seq], slo)[0]
    assert not may_train(gone, max(room, 0) + 1e-6 + max(-room, 0), tick, [seq], slo)[0]


# --- sampling
def test_seeds_reproduce_and_the_id_stands_in_for_a_seed():
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))

    def draw(id, **k):
        r = request(id, [1], temperature=1.0, **k)
        rng = make_rng(r, CPU)
        return [sample(logits, [r.sampling], [rng])[0] for _ in range(20)]

    assert draw(1, seed=5) == draw(2, seed=5) != draw(1, seed=6)
    assert draw(1) == draw(1) != draw(2)
    assert make_rng(request(1, [1]), CPU) is None


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40])
def test_tiny_temperatures_are_nearly_greedy(temperature):
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 10
    p = Sampling(temperature=temperature)
    assert sample(logits, [p], [torch.Generator().manual_seed(0)]) == [int(logits.argmax())]


# --- scheduler
def make(**c):
    return Scheduler(
        EngineConfig(**{"kv_tokens": 160, "block_size": 8, "max_batch": 4, "max_prefill_tokens": 16, **c}),
        SlotTable(3),
        (0,),
        lambda ids: "",
    )


def test_prompt_budget_is_shared_first_come_first_served():
    s = make(kv_tokens=1600)
    for i, n in enumerate((10, 10, 10)):
        s.add(request(i, [1] * n, max_tokens=4), 0.0)
    assert [(c.sequence.request.id, c.stop - c.start) for c in s.schedule()] == [(0, 10), (1, 6)]


def test_cancelling_a_waiting_request_takes_nothing_and_a_running_one_gives_all_back():
    s = make(max_batch=1)
    for i in range(2):
        s.add(request(i, [1] * 8, max_tokens=8), 0.0)
    s.schedule()
    used = s.pool.used_tokens
    s.cancel(1)
    assert s.pool.used_tokens == used and not s.waiting
    s.slots.promote(1, 0)
    event = s.cancel(0)
    assert event.version == 0 and s.pool.used_tokens == 0 and s.slots.retiring == ()


# --- peft folders
def export(rig, folder, **change):
    folder.mkdir()
    config = json.loads(peft_io.config_json(rig.bank, "b"))
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **change}))
    (folder / WEIGHTS_FILE).write_bytes(peft_io.write_weights(random_state(rig.bank, 1)))
    return folder


@pytest.fixture(scope="module")
def rig(tiny_config):
    return make_rig(f"random:{tiny_config}")


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"use_rslora": True},
        {"use_dora": True},
    ],
)
def test_what_cannot_be_served_is_refused(rig, tmp_path, change):
    with pytest.raises(AdapterError, match=next(iter(change))):
        peft_io.read_folder(rig.bank, export(rig, tmp_path / "a", **change))


def test_an_adapter_of_another_method_is_refused(rig, tmp_path):
    with pytest.raises(AdapterError):
        peft_io.read_folder(rig.bank, export(rig, tmp_path / "a", peft_type="LOHA"))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_damaged_adapter_config_is_refused(rig, tmp_path, text):
    folder = export(rig, tmp_path / "a")
    (folder / CONFIG_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError):
        peft_io.read_folder(rig.bank, folder)


def test_a_folder_without_weights_or_a_file_is_refused(rig, tmp_path):
    folder = export(rig, tmp_path / "a")
    (folder / WEIGHTS_FILE).unlink()
    for place in (folder, folder / CONFIG_FILE):
        with pytest.raises(AdapterError, match="not a PEFT adapter folder"):
            peft_io.read_folder(rig.bank, place)


# --- loading
@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nonsense"}', "[]"])
def test_a_random_config_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError):
        load_model(ModelConfig(path=f"random:{tmp_path}", dtype="float32"), CPU)


def test_a_gguf_that_is_none_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\x00" * 64)
    with pytest.raises(InputError):
        load_model(ModelConfig(path=str(tmp_path / "m.gguf"), dtype="float32"), CPU)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError):
        load_model(ModelConfig(path=str(tmp_path), dtype="float32"), CPU)


def test_other_seeds_give_other_weights(tiny_config):
    c = ModelConfig(path=f"random:{tiny_config}", dtype="float32", max_context=64)
    a, b = (load_model(c, CPU, seed=s).model.state_dict() for s in (4, 5))
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_a_model_without_end_of_text_is_an_input_error():
    import tokenizers

    from clif.text import ChatTokenizer

    with pytest.raises(InputError):
        ChatTokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), None, [])


# --- wire
def test_an_up_message_with_an_unknown_tag_is_refused():
    decoder = msgspec.msgpack.Decoder(m.Up)
    for message in ({"type": "Nonsense"}, {"type": "Stop"}, {}):
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(msgspec.msgpack.encode(message))


def test_an_override_of_a_section_keeps_its_other_fields(tmp_path):
    config = load(tmp_path, BASE + "engine: {kv_tokens: 4096}\n", "engine={max_batch: 5}")
    assert (config.engine.kv_tokens, config.engine.max_batch) == (4096, 5)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path, BASE, "slo={ttft_ms: 1, ttft_ms: 2}")


def test_a_checkpoint_that_cannot_be_written_for_any_reason_is_reported(tmp_path):
    writer = CheckpointWriter(tmp_path, 0)
    writer.prepare(Checkpoint(1, 1, {"shadow": torch.zeros(2), "moments": {}, "steps": 1}, {"not json": object()}))
    with pytest.raises(TypeError):
        writer.wait()


def test_a_stranger_at_the_control_socket_does_not_end_the_run():
    import zmq

    from clif.wire.channels import ControlChannel

    control = ControlChannel()
    context = zmq.Context()
    stranger = context.socket(zmq.REQ)
    try:
        stranger.connect(control.address)
        stranger.send(b"hello?")
        with pytest.raises(msgspec.DecodeError, match="3 frames"):
            list(control.receive(10.0))
    finally:
        stranger.close(linger=0)
        context.term()
        control.close()
