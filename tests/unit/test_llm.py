"""The library: a model in ten lines, with the tokens of transformers and of a replica."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import answer, make_rig, random_state, request

import clif
from clif import LLM, Sampling
from clif.adapters.peft_io import config_json, read_folder, write_weights
from clif.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from clif.errors import InputError
from clif.types import FinishReason

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], list(range(1, 60))]
GREEDY = Sampling(max_tokens=12, ignore_eos=True)
EXACT = {"model": {"dtype": "float32", "device": "cpu"}}


def save_adapter(model: str, folder: Path, seed: int, **adapter) -> Path:
    """A random adapter of a model, as PEFT would save it."""
    rig = make_rig(model, adapter=adapter)
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(config_json(rig.bank, "m"))
    (folder / WEIGHTS_FILE).write_bytes(write_weights(random_state(rig.bank, seed)))
    return folder


@pytest.fixture(scope="module")
def random_model(tiny_config) -> str:
    return f"random:{tiny_config}"


@pytest.fixture(scope="module")
def folders(random_model, tmp_path_factory) -> list[Path]:
    """Four adapters, of unequal rank, scale and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = [{"r": 4}, {"r": 16, "lora_alpha": 32}, {"target_modules": ["q_proj", "down_proj"]}, {"r": 2}]
    return [save_adapter(random_model, folder / str(i), i, **kind) for i, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def llm(random_model):
    with LLM(random_model, engine={"kv_tokens": 1024}, **EXACT) as llm:
        yield llm


def served(model: str, folder: Path, prompt: list[int], **adapter) -> list[int]:
    """What an engine answers whose adapters are made for this one."""
    rig = make_rig(model, adapter=adapter, seed=0)
    slot = rig.slots.free_slot()
    rig.bank.fill_slot(slot, read_folder(rig.bank, folder))
    rig.slots.promote(1, slot)
    return answer(rig.run([request(0, prompt, max_tokens=12, ignore_eos=True)])[0])


def test_greedy_tokens_are_those_of_transformers(llm):
    model = llm._engine.runner.stack.model
    for prompt, found in zip(PROMPTS, llm.generate(PROMPTS, GREEDY), strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert list(found.token_ids) == out[0, len(prompt) :].tolist()
        assert found.finish_reason is FinishReason.LENGTH and found.adapter_version == 0


def test_ten_lines_on_the_real_model_with_text_ids_and_messages(stories):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    plain = transformers.AutoModelForCausalLM.from_pretrained(stories)
    with LLM(stories, **EXACT) as llm:
        assert llm.config.model.max_context <= plain.config.max_position_embeddings, "as long as the model allows"
        text = "Once upon a time, there was a little girl"
        ids = tokenizer(text).input_ids
        by_text, by_ids = llm.generate([text, ids], Sampling(max_tokens=30))
        out = plain.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :]
        assert by_text == by_ids and list(by_text.token_ids) == out.tolist()
        assert by_text.text == tokenizer.decode(out, skip_special_tokens=True)
        (chat,) = llm.generate([{"role": "user", "content": "Hello"}], GREEDY)
        (same,) = llm.generate(llm.tokenizer.encode_chat([{"role": "user", "content": "Hello"}]), GREEDY)
        assert chat == same
        events = list(llm.stream([text, text], Sampling(max_tokens=30, stop=("nd",))))
        (whole,) = llm.generate(text, Sampling(max_tokens=30, stop=("nd",)))
        for index in (0, 1):
            mine = [e for e in events if e.index == index]
            assert "".join(e.text for e in mine) == whole.text
            assert mine[-1].finish_reason is whole.finish_reason
        if whole.finish_reason is FinishReason.STOP:
            assert "nd" not in whole.text


def test_a_stream_gives_every_token_as_it_comes_and_the_text_of_generate(llm):
    events = list(llm.stream(PROMPTS, GREEDY))
    for index, whole in enumerate(llm.generate(PROMPTS, GREEDY)):
        mine = [e for e in events if e.index == index]
        assert sum((e.token_ids for e in mine), ()) == whole.token_ids and "".join(e.text for e in mine) == whole.text
        assert [e.finish_reason for e in mine[:-1]] == [None] * 11 and mine[-1].finish_reason is FinishReason.LENGTH
    assert {e.index for e in events[:3]} == {0, 1, 2}, "they are answered together"


def test_streams_take_turns_and_one_that_is_closed_cancels_what_is_left(llm):
    expected = [c.token_ids for c in llm.generate(PROMPTS[:2], GREEDY)]
    first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
    found = [next(first), next(second), next(first)]
    third = llm.stream(PROMPTS[2], GREEDY)
    next(third)
    third.close()
    unasked = llm.stream(PROMPTS[2], GREEDY)
    rest = (list(first), list(second))
    assert found[0].token_ids + found[2].token_ids + sum((e.token_ids for e in rest[0]), ()) == expected[0]
    assert found[1].token_ids + sum((e.token_ids for e in rest[1]), ()) == expected[1]
    scheduler = llm._engine.scheduler
    assert not scheduler.running and not scheduler.waiting and not llm._events
    unasked.close()


def test_steps_that_overlap_give_the_same_answers_and_leave_nothing_behind(random_model, folders, llm):
    asked = {"sampling": GREEDY, "adapter": [folders[0], None, folders[1]]}
    expected = [c.token_ids for c in llm.generate(PROMPTS, **asked)]
    with LLM(random_model, engine={"kv_tokens": 1024, "overlap": True}, **EXACT) as overlapped:
        cut = overlapped.stream(PROMPTS, **asked)
        next(cut)
        cut.close()
        assert [c.token_ids for c in overlapped.generate(PROMPTS, **asked)] == expected
        scheduler = overlapped._engine.scheduler
        assert not scheduler.running and not scheduler.waiting and not overlapped._events


def test_adapters_of_one_batch_answer_as_each_does_in_an_engine_made_for_it(random_model, folders, llm):
    """Ranks, scales and modules differ: they share the slots of one engine."""
    (base,) = llm.generate(PROMPTS[0], GREEDY)
    mixed = llm.generate([PROMPTS[0]] * 3, GREEDY, adapter=[folders[0], None, str(folders[1])])
    assert mixed[1] == base and mixed[0].token_ids != base.token_ids != mixed[2].token_ids
    assert sorted(c.adapter_version for c in mixed)[0] == 0 and len({c.adapter_version for c in mixed}) == 3
    again = llm.generate([PROMPTS[0]], GREEDY, adapter=folders[2])
    for folder, found, kind in (
        (folders[0], mixed[0], {"r": 4}),
        (folders[1], mixed[2], {"r": 16, "lora_alpha": 32}),
        (folders[2], again[0], {"target_modules": ["q_proj", "down_proj"]}),
    ):
        assert list(found.token_ids) == served(random_model, folder, PROMPTS[0], **kind)


def test_the_adapter_that_nobody_asked_for_longest_makes_room_and_comes_back(folders, llm):
    first = [llm.generate(PROMPTS[0], GREEDY, adapter=folder)[0] for folder in folders]
    again = [llm.generate(PROMPTS[0], GREEDY, adapter=folder)[0] for folder in folders]
    assert [c.token_ids for c in first] == [c.token_ids for c in again]
    with pytest.raises(InputError, match=r"4 adapters at once, but adapter.serving_slots is 3: raise it"):
        llm.generate([PROMPTS[0]] * 4, GREEDY, adapter=folders)
    streams = [llm.stream(PROMPTS[0], GREEDY, adapter=folder) for folder in folders[:3]]
    begun = [next(stream).token_ids for stream in streams]
    with pytest.raises(InputError, match="all 3 adapter slots are read by requests that run: wait for them"):
        llm.generate(PROMPTS[0], GREEDY, adapter=folders[3])
    rest = [sum((e.token_ids for e in stream), ()) for stream in streams]
    assert [a + b for a, b in zip(begun, rest, strict=True)] == [c.token_ids for c in first[:3]]


def test_names_of_adapters_and_a_new_export_into_the_same_folder(random_model, folders, tmp_path):
    folder = save_adapter(random_model, tmp_path / "a", 7, r=32)
    with LLM(random_model, adapters={"home": folder}, engine={"kv_tokens": 1024}, **EXACT) as llm:
        assert llm.config.adapter.r == 32, "the largest of those that are named"
        (before,) = llm.generate(PROMPTS[0], GREEDY, adapter="home")
        (folder / WEIGHTS_FILE).write_bytes((folders[1] / WEIGHTS_FILE).read_bytes())
        (folder / CONFIG_FILE).write_text((folders[1] / CONFIG_FILE).read_text())
        (after,) = llm.generate(PROMPTS[0], GREEDY, adapter="home")
        assert after.token_ids == llm.generate(PROMPTS[0], GREEDY, adapter=folders[1])[0].token_ids
        assert after.token_ids != before.token_ids and after.adapter_version > before.adapter_version


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((5,), "prompts is a int: give a text, token ids, messages, or a list of these"),
        (([[]],), "prompt 0 has no tokens"),
        ((["hi", [5, "x"]],), "prompt 1 is none: give a text, a list of token ids"),
        (([{"role": "user"}],), "prompt 0 is none"),
        (([5, True],), "prompt 0 is none"),
        (([[5], [300]],), "prompt 1 has a token id outside of the vocabulary, 0 to 299"),
        (([-1],), "outside of the vocabulary"),
        (([5] * 250, GREEDY), "prompt 0 has 250 tokens and may be answered with 12, together more than the longest"),
        ((PROMPTS, [GREEDY]), "sampling has 1 entries for 3 prompts"),
        ((PROMPTS, "greedy"), "sampling is 'greedy': give a Sampling, None, or a list"),
        ((PROMPTS, GREEDY, 7), "adapter is 7: give a str or Path, None, or a list"),
        ((PROMPTS, GREEDY, "none/here"), "none/here is not a PEFT adapter folder: No such file"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_what_to_change_and_nothing_runs(llm, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        llm.generate(*arguments)
    assert not llm._engine.serving and not llm._events


def test_nothing_to_answer_is_an_empty_list(llm):
    assert llm.generate([]) == []


def test_an_adapter_of_a_larger_rank_is_refused_with_the_field_to_raise(random_model, folders):
    llm = LLM(random_model, adapter={"r": 8}, engine={"kv_tokens": 1024}, **EXACT)
    with llm, pytest.raises(InputError, match=r"has r=16, more than adapter.r 8: raise adapter.r"):
        llm.generate(PROMPTS[0], GREEDY, adapter=folders[1])


@pytest.mark.parametrize(
    "changes, lost, sentence",
    [
        ({"r": "8"}, "", "has r=8: correct it to a whole number above 0"),
        ({"r": 3}, "", r"down_proj.lora_A.weight has shape \[4, 96\], not \[3, 96\]"),
        ({"lora_alpha": -1}, "", "has lora_alpha=-1: correct it to a number above 0"),
        ({"use_dora": True}, "", "uses use_dora, which cannot be served"),
        ({}, "lora_B", "without its other factor: export the adapter again"),
    ],
)
def test_an_adapter_that_cannot_be_fitted_is_refused_with_what_to_change(
    llm, folders, tmp_path, changes, lost, sentence
):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(json.loads((folders[0] / CONFIG_FILE).read_text()) | changes))
    state = safetensors.torch.load_file(folders[0] / WEIGHTS_FILE)
    kept = {name: tensor for name, tensor in state.items() if not lost or lost not in name}
    safetensors.torch.save_file(kept, tmp_path / WEIGHTS_FILE)
    with pytest.raises(InputError, match=sentence):
        llm.generate(PROMPTS[0], GREEDY, adapter=tmp_path)


def test_a_closed_library_refuses_and_so_do_its_streams(random_model):
    llm = LLM(random_model, engine={"kv_tokens": 1024}, **EXACT)
    stream = llm.stream(PROMPTS, GREEDY)
    next(stream)
    cache = weakref.ref(llm._engine.runner.cache)
    llm.close()
    assert cache() is None, "the memory is given back"
    for use in (lambda: list(stream), lambda: llm.generate(PROMPTS[0]), lambda: llm.stream(PROMPTS[0])):
        with pytest.raises(InputError, match="this LLM is closed: make another one"):
            use()
    llm.close()


def test_wrong_settings_are_refused_as_in_a_file(random_model):
    with pytest.raises(InputError, match=r"unknown key engine.max_bach"):
        LLM(random_model, engine={"max_bach": 3})
    with pytest.raises(InputError, match=r"model.path assets/none.gguf does not exist: run `clif fetch`"):
        LLM("assets/none.gguf")


def test_importing_clif_imports_no_torch_until_the_library_is_used():
    code = "import sys, clif; assert 'torch' not in sys.modules; clif.Sampling; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert clif.LLM is LLM and all(hasattr(clif, name) for name in clif.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'LMM'"):
        clif.LMM  # noqa: B018
