"""engine.kv_tokens auto: the KV cache gets what is left, once all else has been measured or counted."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from helpers import small_config
from hypothesis import given
from hypothesis import strategies as st

from clif.config import Config, ConfigError
from clif.distributed.collectives import TpGroup
from clif.engine import kv_size
from clif.engine.base import build_base
from clif.engine.engine import Engine
from clif.engine.kv_size import (
    RESERVE,
    KvRoom,
    kv_tokens_for,
    largest_step,
    measured_room,
    resolve_kv_tokens,
    token_bytes,
)
from clif.models.weights.loading import load_model

MIB = 1 << 20


def auto_config(tiny_config, train: bool = False, **engine) -> Config:
    config = small_config(f"random:{tiny_config}", engine={"kv_tokens": "auto", **engine})
    return config.model_copy(update={"train": config.train.model_copy(update={"enabled": train})})


def make_base(config: Config):
    return build_base(config, load_model(config.model, torch.device("cpu"), 3))


class Peer(TpGroup):
    """A group whose other rank finds room for `other` tokens."""

    def __init__(self, other: int) -> None:
        super().__init__()
        self.other = other

    def least(self, value: int) -> int:
        return min(value, self.other)


class FakeMemory:
    """A GPU of which so much is free, where a step takes `more`, its cache included, and without draws so much less."""

    def __init__(self, free: int, more: int, draws: int = 0) -> None:
        self.free_bytes, self.more, self.draws, self.works = free, more, draws, 0

    def free(self) -> int:
        return self.free_bytes

    def peak(self, work: Callable[[], None]) -> int:
        work()
        self.works += 1
        # Each second work draws no tokens, and takes less.
        return self.more - (1 - self.works % 2) * self.draws


def test_the_cache_gets_what_is_left_in_whole_blocks_and_a_spare_one_is_kept():
    room = KvRoom(free=1000 * MIB, step=100 * MIB, training=200 * MIB, captured=50 * MIB)
    tokens, reason = kv_tokens_for(room, token_bytes=MIB, block_size=16, most=10_000)
    assert tokens == 576 and tokens + 16 <= 950 - 350
    assert reason == (
        "of 1.0 GiB free less 5%, 0.1 GiB for the largest step, 0.2 GiB for training, 0.0 GiB for what is captured, "
        "0.6 GiB are left"
    )


def test_no_more_is_taken_than_requests_of_full_length_fill():
    tokens, reason = kv_tokens_for(KvRoom(free=1 << 40), MIB, 16, most=8192)
    assert tokens == 8192 and "need no more" in reason


@given(st.integers(-(1 << 40), 1 << 40), st.integers(1, 1 << 20), st.integers(1, 256), st.integers(1, 1000))
def test_it_always_fits_and_is_never_negative(free, token, block, blocks):
    most = block * blocks
    tokens, _ = kv_tokens_for(KvRoom(free), token, block, most)
    assert 0 <= tokens <= most and tokens % block == 0
    assert not tokens or (tokens + block) * token <= free * (1 - RESERVE) + 1 or tokens == most


def test_the_least_of_the_ranks_that_share_a_model_counts_for_all(tiny_config, caplog):
    config = auto_config(tiny_config)
    base = make_base(config)
    room = KvRoom(int(602 * token_bytes(base, config.engine) / (1 - RESERVE)))
    with caplog.at_level(logging.INFO):
        assert resolve_kv_tokens(config, base, TpGroup(), room=room).engine.kv_tokens == 596
        assert resolve_kv_tokens(config, base, Peer(400), room=room).engine.kv_tokens == 400
    assert "engine.kv_tokens: 596" in caplog.text and "a peer has room for no more" in caplog.text


def test_a_request_of_full_length_has_to_fit_on_every_rank(tiny_config):
    config = auto_config(tiny_config)
    base = make_base(config)
    with pytest.raises(ConfigError, match=r"finds room for 252 tokens, and model.max_context is 256 .*: lower model"):
        resolve_kv_tokens(config, base, Peer(252), room=KvRoom(1 << 40))


def test_a_given_number_is_kept_and_nothing_is_measured(tiny_config):
    config = small_config(f"random:{tiny_config}")
    assert resolve_kv_tokens(config, None, TpGroup()) is config


def test_on_a_cpu_the_cache_is_as_large_as_the_batch_can_fill_where_the_host_has_room(tiny_config):
    config = auto_config(tiny_config, max_batch=3)
    engine = Engine.from_config(config)
    assert engine.config.kv_tokens == config.kv_tokens_bound == 3 * 256
    assert engine.runner.cache.bytes == (3 * 256 + 4) * token_bytes(make_base(config), config.engine)


@pytest.mark.parametrize(("prefill", "prompts"), [(24, [24]), (600, [256, 256, 88]), (257, [256]), (1, [])])
def test_the_largest_step_has_a_row_for_each_request_and_prompts_that_fill_its_budget(tiny_config, prefill, prompts):
    engine = small_config(f"random:{tiny_config}", engine={"max_prefill_tokens": prefill}).engine
    chunks, blocks = largest_step(engine, max_context=256)
    assert [c.stop - c.start for c in chunks] == prompts + [1] * (engine.max_batch - len(prompts))
    held = [block for chunk in chunks for block in chunk.sequence.blocks]
    assert sorted(held) == list(range(blocks)), "no two sequences share a block"


def test_what_is_measured_is_a_real_step_without_its_own_cache(tiny_config):
    """On this CPU, with a GPU's memory made up: nothing is captured here."""
    config = auto_config(tiny_config)
    base = make_base(config)
    _, blocks = largest_step(config.engine, 256)
    cache = token_bytes(base, config.engine) * (blocks + 1) * config.engine.block_size
    memory = FakeMemory(500 * MIB, cache + 7 * MIB)
    room = measured_room(config, base, 1, memory)
    assert memory.works == 2 and (room.free, room.step, room.captured) == (500 * MIB, 7 * MIB, 0)
    head = 64 * base.stack.vocab_size * 12
    assert room.training == head, "held-out losses need logits in any case"
    trains = measured_room(auto_config(tiny_config, train=True), base, 1, memory)
    assert trains.training == head + (config.engine.activation_mib << 20) + 6 * base.bank.shadow.nbytes


def test_what_is_captured_is_counted_where_a_gpu_captures(tiny_config, monkeypatch):
    """The decisions are those of a GPU with the kernels; nothing is captured here."""
    config = auto_config(tiny_config, train=True, max_batch=8)
    base = make_base(config)
    for name in ("why_not_captured", "why_training_not_captured"):
        monkeypatch.setattr(kv_size, name, lambda *_: "")
    _, blocks = largest_step(config.engine, 256)
    cache = token_bytes(base, config.engine) * (blocks + 1) * config.engine.block_size
    room = measured_room(config, base, 1, FakeMemory(500 * MIB, cache + 7 * MIB, draws=5 * MIB))
    logits = (1 + 2 + 4 + 8) * base.stack.vocab_size * 4
    assert room.step == 7 * MIB
    assert room.captured == logits + 2 * MIB + (config.engine.activation_mib << 20) + 2 * MIB, "without draws"
