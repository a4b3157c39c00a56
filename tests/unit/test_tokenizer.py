"""Promises of the text layer: the ids are those of transformers, in a process that does not have transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from clif.errors import InputError
from clif.tokenizer import CHAT_FILE, TOKENIZER_FILE, ChatError, ChatTokenizer, from_transformers

GGUF = Path(__file__).resolve().parents[2] / "assets" / "smollm2-135m-instruct.gguf"

CHATML = """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""
LLAMA_LIKE = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}{%- set rest = messages %}
{%- endif %}
{%- for m in rest %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if m['content'] == 'STOP' %}{%- break %}{%- endif %}
    {%- if m['content'] == 'SKIP' %}{%- continue %}{%- endif %}
    {{- '[' + m['role'] + '] ' + ({'system': system, 'text': m['content']} | tojson) + eos_token }}
{%- endfor %}
"""
CHATS = [
    [{"role": "user", "content": "Turn on the lamp."}],
    [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": "  Größe?  <b>'x'</b>\n"}],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "SKIP"},
        {"role": "user", "content": "two 🏠"},
        {"role": "assistant", "content": "STOP"},
        {"role": "user", "content": "three"},
    ],
]


def fast_tokenizer(
    template: str | None, *, prepend_bos: bool = False, **tokens: str
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, as transformers wraps it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, "on", "th", "the", "Ġthe"])}
    merges = [("o", "n"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    if prepend_bos:
        bos = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    made.chat_template = template
    return made


def theirs(tokenizer: transformers.PreTrainedTokenizerFast, chat: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)


@pytest.fixture
def chatml() -> transformers.PreTrainedTokenizerFast:
    return fast_tokenizer(CHATML, eos_token="<|im_end|>")


@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE], ids=["chatml", "llama-like"])
@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("chat", CHATS, ids=["user", "system", "long"])
def test_chats_get_the_ids_of_transformers(template, prepend_bos, chat):
    """System messages, whitespace control, loop controls, tojson, special tokens written by the template."""
    tokenizer = fast_tokenizer(template, prepend_bos=prepend_bos, bos_token="<s>", eos_token="<|im_end|>")
    assert from_transformers(tokenizer, []).encode_chat(chat) == theirs(tokenizer, chat)


def test_what_a_template_refuses_is_refused_with_its_own_words():
    tokenizer = fast_tokenizer(LLAMA_LIKE, bos_token="<s>", eos_token="<|im_end|>")
    wrong = [{"role": "assistant", "content": "first"}]
    with pytest.raises(ChatError, match="roles must alternate"):
        from_transformers(tokenizer, []).encode_chat(wrong)


def test_a_template_cannot_reach_out_of_its_sandbox(chatml):
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    ours = ChatTokenizer(chatml.backend_tokenizer, attack, [0])
    with pytest.raises(ChatError, match="__class__"):
        ours.encode_chat(CHATS[0])


@pytest.mark.parametrize(
    "template", ["{{ 'a' + none }}", "{{ 1 // 0 }}", "{{ range(10**9) }}", "{{ messages[7].content.x }}"]
)
def test_a_template_that_fails_is_an_error_that_says_why(chatml, template):
    with pytest.raises(ChatError, match="does not take messages of the roles user"):
        ChatTokenizer(chatml.backend_tokenizer, template, [0]).encode_chat(CHATS[0])


def test_a_template_that_is_no_jinja_is_an_error_that_says_where(chatml):
    with pytest.raises(InputError, match="no valid Jinja"):
        ChatTokenizer(chatml.backend_tokenizer, "{% for %}", [0]).encode_chat(CHATS[0])


@pytest.mark.parametrize("template", [CHATML, None])
def test_half_a_character_is_no_text(chatml, template):
    ours = ChatTokenizer(chatml.backend_tokenizer, template, [0])
    with pytest.raises(ChatError, match="half of a character"):
        ours.encode_chat([{"role": "user", "content": "x \ud83d"}])
    with pytest.raises(ChatError, match="half of a character"):
        ours.encode_answer("x \ud83d")


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", [CHAT_FILE, TOKENIZER_FILE])
def test_a_damaged_folder_is_an_error_that_names_it(chatml, tmp_path, name, damage):
    from_transformers(chatml, []).save(tmp_path)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(InputError, match=f"{tmp_path} holds no tokenizer"):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE, None], ids=["chatml", "llama-like", "base"])
def test_saved_and_loaded_it_is_the_same(tmp_path, template):
    """The folder is all that the control process gets."""
    ours = from_transformers(fast_tokenizer(template, bos_token="<s>", eos_token="<|im_end|>"), [7])
    ours.save(tmp_path / "tokenizer")
    again = ChatTokenizer.load(tmp_path / "tokenizer")
    assert (again.template, again.eos_ids, again.special) == (ours.template, ours.eos_ids, ours.special)
    for chat in CHATS:
        assert again.encode_chat(chat) == ours.encode_chat(chat)
    assert again.encode_answer("on the Größe") == ours.encode_answer("on the Größe")


def test_a_base_model_gets_the_contents_line_by_line():
    tokenizer = fast_tokenizer(None, bos_token="<s>", eos_token="<|im_end|>", prepend_bos=True)
    ours = from_transformers(tokenizer, [])
    expected = tokenizer("Answer in JSON.\n  Größe?  <b>'x'</b>\n\n")["input_ids"]
    assert ours.encode_chat(CHATS[1]) == expected
    assert expected[0] == tokenizer.bos_token_id, "no template writes it, so the tokenizer has to"


def test_an_answer_ends_with_the_end_of_text_and_begins_with_nothing(chatml):
    tokenizer = fast_tokenizer(CHATML, prepend_bos=True, bos_token="<s>", eos_token="<|im_end|>")
    ids = from_transformers(tokenizer, []).encode_answer("on the")
    assert ids == [*tokenizer("on the", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert from_transformers(chatml, []).encode_answer("") == [chatml.eos_token_id]


def test_the_tokenizers_own_end_comes_first_and_no_end_is_named_twice(chatml):
    eos = chatml.eos_token_id
    assert from_transformers(chatml, [3, eos, 3]).eos_ids == (eos, 3)


def test_decode_leaves_special_tokens_out_and_gives_text_back(chatml):
    ours = from_transformers(chatml, [])
    assert ours.decode(ours.encode_answer("Größe 🏠 on the 'x'")) == "Größe 🏠 on the 'x'"
    assert ours.decode([]) == ""


def test_without_an_end_of_text_token_it_says_what_to_set():
    tokenizer = fast_tokenizer(CHATML)
    with pytest.raises(ValueError, match=r"no end-of-text token: set eos_token in its tokenizer_config\.json"):
        from_transformers(tokenizer, [])
    assert from_transformers(tokenizer, [3]).eos_ids == (3,), "the model's generation config may name it instead"


def test_a_chat_tokenizer_without_an_end_of_text_cannot_be_made():
    with pytest.raises(InputError, match="no end-of-text token"):
        ChatTokenizer(tokenizers.Tokenizer(models.BPE()), None, [])


def test_a_tokenizer_without_a_fast_backend_is_refused():
    class Slow:
        chat_template = None

    with pytest.raises(ValueError, match=r"Slow has no fast tokenizer: add a tokenizer\.json"):
        from_transformers(Slow(), [1])


def test_of_several_templates_the_default_one_is_taken(chatml):
    chatml.chat_template = {"default": CHATML, "tool_use": "{{ 'tools' }}"}
    assert from_transformers(chatml, []).template == CHATML


@pytest.fixture(scope="module")
def smollm2():
    if not GGUF.is_file():
        pytest.skip("assets/smollm2-135m-instruct.gguf is not here: run `clif fetch` to test the real model")
    return transformers.AutoTokenizer.from_pretrained(str(GGUF.parent), gguf_file=GGUF.name)


@pytest.mark.parametrize("chat", CHATS, ids=["user", "system", "long"])
def test_the_real_smollm2_gets_the_ids_of_transformers(smollm2, chat):
    ours = from_transformers(smollm2, [])
    assert ours.encode_chat(chat) == theirs(smollm2, chat)
    assert ours.decode(ours.encode_answer("{'a': 1} Größe")) == "{'a': 1} Größe"


def test_the_byte_tokenizer_of_random_models_gives_text_back(tiny_config):
    from clif.models.bytes_tokenizer import byte_tokenizer

    ours = byte_tokenizer(300)
    ids = ours.encode_answer("Größe 🏠\n")
    assert len(ids) == len("Größe 🏠\n".encode()) + 1 and ids[-1] == ours.eos_ids[0] == 256
    assert ours.decode(ids) == "Größe 🏠\n"
