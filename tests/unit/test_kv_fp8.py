"""A KV cache of eight bits: twice the tokens, and answers that are those of keys and values rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rig, answer, make_rig, request, small_config
from transformers import DynamicCache

from clif.config import ConfigError
from clif.engine.checked_capture import CheckedRecorder
from clif.kernels.kv_types import FP8, as_cached, read_slots, write_slots
from clif.kernels.paged_decode_reference import PagedDecodeReference
from clif.models.backends import choose_decode, choose_ops
from clif.models.estimate import estimate
from clif.models.layer_ops import TorchOps
from clif.models.spec import spec_of
from clif.models.triton_ops import TritonOps
from clif.models.weights.loading import load_model
from clif.types import Request

PROMPTS = [[7, 3, 9], [11, 5, 8, 2, 40, 41, 17], [5], list(range(20, 75)), [*range(20, 60), 9], [9, 9, 9, 1, 2, 3, 4]]
TOKENS = 12
ARRIVE = {i: 2 * i for i in range(len(PROMPTS))}


def rig_of(model: str, **engine: Any) -> Rig:
    return make_rig(model, engine={"kv_dtype": "fp8", **engine})


def requests_of(prompts: Sequence[list[int]] = PROMPTS) -> list[Request]:
    return [request(i, prompt, max_tokens=TOKENS, ignore_eos=True) for i, prompt in enumerate(prompts)]


def answers(rig: Rig) -> list[list[int]]:
    events = rig.run(requests_of(), arrive=ARRIVE)
    return [answer(events[i]) for i in range(len(PROMPTS))]


class Rounded(DynamicCache):
    """transformers' cache, whose keys and values are rounded to eight bits before they are read."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        key, value = (x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) for x in (key_states, value_states))
        return super().update(key, value, *args, **options)


def reference(model: Any, prompt: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        past_key_values=Rounded(config=model.config),
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


# --- answers


def test_answers_are_those_of_a_model_whose_keys_and_values_are_rounded(tiny_config: Path) -> None:
    """Long prompts in pieces, a shared beginning, and answers beside prompts."""
    rig = rig_of(f"random:{tiny_config}")
    plain = load_model(rig.config.model, torch.device("cpu"), seed=3).model
    assert answers(rig) == [reference(plain, prompt) for prompt in PROMPTS]
    assert rig.engine.scheduler.reused_tokens > 0
    assert rig.runner.cache.layers[0].dtype == FP8


def test_answers_of_a_real_model_are_those_of_rounded_keys_and_values(stories: str) -> None:
    rig = rig_of(stories)
    plain, found = load_model(rig.config.model, torch.device("cpu")).model, answers(rig)
    assert found == [reference(plain, prompt) for prompt in PROMPTS]
    assert found != answers(make_rig(stories)), "the roundings show"


def test_an_answer_depends_on_nothing_but_its_prompt(tiny_config: Path) -> None:
    """Not on pieces, reuse of a beginning, or a cache so small that requests start again; never on stale numbers."""
    model = f"random:{tiny_config}"
    expected = answers(rig_of(model))
    assert answers(rig_of(model, prefix_reuse=False, max_prefill_tokens=512)) == expected
    small = rig_of(model, kv_tokens=256, max_prefill_tokens=7)
    for layer in small.runner.cache.layers:
        layer.fill_(torch.nan)
    assert answers(small) == expected


def test_captured_steps_give_the_answers_of_plain_ones(tiny_config: Path) -> None:
    """As far as a CPU can capture: under the rules of a CUDA graph."""
    model, rules = f"random:{tiny_config}", CheckedRecorder()
    rig = rig_of(model)
    rig.runner.paged = PagedDecodeReference()  # type: ignore[assignment]
    rig.runner.capture(rules, 256)
    assert answers(rig) == answers(rig_of(model))
    assert any(region.replays for region in rules.regions)


def test_the_kernels_give_the_answers_of_torch(monkeypatch: pytest.MonkeyPatch, two_layers: Path) -> None:
    """Rotation with the write to the cache, and paged decode, in Triton's interpreter."""
    from clif.kernels.paged_decode_config import DecodeConfig
    from clif.kernels.paged_decode_host import PagedDecode

    model, found = f"random:{two_layers}", []
    for ops in (TorchOps(), TritonOps(256)):
        monkeypatch.setattr("clif.engine.base.choose_ops", lambda *_, ops=ops: ops)
        rig = rig_of(model)
        if isinstance(ops, TritonOps):
            rig.runner.paged = PagedDecode(torch.device("cpu"), DecodeConfig(block_kv=16, parts=2, least=16))
        events = rig.run([request(0, PROMPTS[0], max_tokens=3, ignore_eos=True)])
        found.append(answer(events[0]))
    assert found[0] == found[1]


# --- numbers


def test_what_is_written_saturates_and_a_nan_stays_in_its_slot() -> None:
    cache = torch.zeros(2, 5, 4, dtype=torch.uint8).view(FP8)
    x = torch.tensor([[1.0, 449.0, -1e30, 0.3], [torch.nan, torch.inf, -torch.inf, 2.0**-10]]).expand(2, 2, 4)
    write_slots(cache, torch.tensor([3, 1]), x)
    found = read_slots(cache, torch.tensor([0, 1, 3]), torch.bfloat16)
    assert found.dtype == torch.bfloat16 and not found[:, 0].any()
    assert found[0, 2].tolist() == [1.0, 448.0, -448.0, 0.3125]
    assert found[0, 1, 0].isnan() and found[0, 1, 1:].tolist() == [448.0, -448.0, 0.0]
    assert torch.equal(as_cached(x, FP8).nan_to_num(), found[:, [2, 1]].float().nan_to_num())


def test_a_cache_of_the_model_s_type_is_not_rounded() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    assert as_cached(x, torch.bfloat16) is x


# --- memory, and what can run where


def test_a_token_takes_half_the_memory_of_a_16_bit_type(tiny_config: Path) -> None:
    model = f"random:{tiny_config}"
    assert 4 * rig_of(model).runner.cache.bytes == make_rig(model).runner.cache.bytes, "float32 here"
    spec = spec_of(make_rig(model).loaded.model.config)
    sizes = [
        estimate(small_config(model, engine={"kv_dtype": kv_dtype}, model={"dtype": "bfloat16"}), spec, 1, "cuda")
        for kv_dtype in ("auto", "fp8")
    ]
    assert sizes[0].kv_cache == 2 * sizes[1].kv_cache > 0
    assert sizes[0].weights == sizes[1].weights


def test_a_gpu_without_numbers_of_eight_bits_takes_torch_or_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, capability = torch.device("cuda"), (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("clif.models.triton_ops.kernel_fault", lambda *_: None)
    assert choose_decode("auto", gpu, torch.bfloat16, FP8) is None
    assert choose_decode("auto", gpu, torch.bfloat16, torch.bfloat16) is not None
    assert isinstance(choose_ops(gpu, torch.bfloat16, 64, FP8), TorchOps)
    sentence = r"needs compute capability 8\.9, .* has 8\.0: set engine\.kv_dtype=auto, or set engine\.decode_kernel="
    with pytest.raises(ConfigError, match=sentence):
        choose_decode("triton", gpu, torch.bfloat16, FP8)
    capability = (8, 9)
    assert choose_decode("triton", gpu, torch.bfloat16, FP8) is not None
    assert isinstance(choose_ops(gpu, torch.bfloat16, 64, FP8), TritonOps)
