"""Promises of text that is decoded token by token: it is that of all tokens together, and no id breaks it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from clif.models.bytes_tokenizer import byte_tokenizer
from clif.text_stream import TextStream, cut_at_stop, token_text
from clif.tokenizer import ChatTokenizer
from clif.types import FinishReason, TokenEvent

STORIES = Path(__file__).resolve().parents[3] / "shared" / "weights" / "stories260K-hf" / "tokenizer.json"
TEXTS = ["Once upon a time, naïve 猫 said: “日本語”… 🐈‍⬛ 👩‍👩‍👧 e\u0301", "a  b\n\n   c\t", "\ufffd\ufffd x", ""]


def byte_level() -> ChatTokenizer:
    """As those of Qwen and Llama 3: tokens of several bytes, which may end within a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return ChatTokenizer(tokenizer, None, [tokenizer.token_to_id("<|end|>")])


def fallback() -> ChatTokenizer:
    """As those of Llama 2 and Gemma: words with a space before them, single bytes for all else."""
    words = [
        "<s>",
        "</s>",
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "▁▁",
        "▁a",
        "b",
        "▁the",
        "猫",
        "\ufffd",
    ]
    tokenizer = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([*steps])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return ChatTokenizer(tokenizer, None, [1])


def stories() -> ChatTokenizer:
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is absent")
    return ChatTokenizer(tokenizers.Tokenizer.from_file(str(STORIES)), None, [2])


TOKENIZERS = [byte_level, fallback, stories, lambda: byte_tokenizer(300)]
NAMES = ["byte level", "byte fallback", "stories260K", "bytes"]
everywhere = pytest.mark.parametrize("make", TOKENIZERS, ids=NAMES)


def random_ids(tokenizer: ChatTokenizer, seed: int) -> list[int]:
    """Tokens of all kinds, an id that only the model has among them; often several rare ones in a row."""
    rng, size = random.Random(seed), tokenizer.tokenizer.get_vocab_size()
    ids: list[int] = []
    while len(ids) < 60:
        few = [rng.randrange(size + 1) for _ in range(rng.randint(1, 3))]
        ids += [rng.choice(few) for _ in range(rng.randint(1, 12))]
    return ids


@everywhere
def test_pieces_add_up_to_the_text_of_all_tokens_whatever_they_are(make):
    tokenizer = make()
    for seed in range(400):
        ids = random_ids(tokenizer, seed)
        stream = TextStream(tokenizer)
        pieces = [stream.add([token]) for token in ids]
        before_the_end = "".join(pieces)
        whole = tokenizer.decode(ids)
        assert whole.startswith(before_the_end), seed
        assert before_the_end + stream.end() == stream.sent == whole


@everywhere
def test_tokens_of_real_text_come_at_once_in_whole_characters(make):
    tokenizer = make()
    for text in TEXTS[:2]:
        ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        stream = TextStream(tokenizer)
        pieces = [stream.add([token]) for token in ids]
        assert "\ufffd" not in "".join(pieces) and "".join(pieces) + stream.end() == tokenizer.decode(ids)
    letters = tokenizer.tokenizer.encode("bbbb", add_special_tokens=False).ids
    stream = TextStream(tokenizer)
    shown = [stream.add([token]) for token in letters]
    assert "".join(shown) == tokenizer.decode(letters), "plain letters do not wait"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_may_begin_a_stop_string_waits_and_the_last_event_has_the_rest(size):
    tokenizer = byte_tokenizer(300)
    ids = tokenizer.encode_text("one two END three")
    stream, seen = TextStream(tokenizer, ("END", "xyz")), ""
    before, last = ids[:10], tuple(ids[10:11])
    for at in range(0, len(before), size):
        seen += stream.take(TokenEvent(request_id=1, tokens=tuple(before[at : at + size])))
    assert seen == "one two "
    seen += stream.take(TokenEvent(request_id=1, tokens=last, finish=FinishReason.STOP, text="one two "))
    assert seen == stream.sent == "one two " and stream.ids == ids[:11]
    stream = TextStream(tokenizer, ("END",))
    assert stream.add(ids[:10]) == "one two "
    assert stream.end() == "EN", "it was none"


@everywhere
def test_a_stop_string_is_found_with_the_token_that_completes_it_as_in_the_whole_text(make):
    """Of all places at which it may lie, within characters and runs of bytes, too."""
    tokenizer, found = make(), 0
    for seed in range(150):
        rng = random.Random(seed)
        ids = random_ids(tokenizer, seed)
        if seed % 2:
            ids = tokenizer.tokenizer.encode(rng.choice(TEXTS[:2]) * 4, add_special_tokens=False).ids
        whole = tokenizer.decode(ids)
        at, size = rng.randrange(len(whole)), rng.choice([1, 2, 3, 7])
        stop = (whole[at : at + size], "never there")
        for end in range(1, len(ids) + 1):
            text = tokenizer.decode(ids[:end])
            expected = text[: text.find(stop[0])] if stop[0] in text else None
            assert cut_at_stop(tokenizer.decode, ids[:end], stop) == expected, (seed, end, stop)
            if expected is not None:
                found += 1
                break
    assert found > 100


def test_the_end_of_a_long_answer_is_all_that_is_decoded_of_it():
    tokenizer, lengths = byte_tokenizer(300), list[int]()

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return tokenizer.decode(ids)

    ids = tokenizer.encode_text("once upon a time " * 100)
    assert cut_at_stop(decode, ids, ("END",)) is None and max(lengths) < 40
    assert cut_at_stop(decode, [*ids, *tokenizer.encode_text("END")], ("END",)) == "once upon a time " * 100


@everywhere
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(make):
    tokenizer = make()
    for text in TEXTS[:2]:
        ids = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        data = b"".join(token_text(tokenizer, token)[1] for token in ids)
        # Some decoders take the space before the first word away.
        assert data.decode().removeprefix(" ") == tokenizer.decode(ids).removeprefix(" ")


def test_a_token_of_a_part_of_a_character_has_its_bytes_and_special_ones_their_names():
    tokenizer = byte_tokenizer(300)
    first = tokenizer.encode_text("猫")[0]
    assert token_text(tokenizer, first) == ("\ufffd", "猫".encode()[:1])
    assert token_text(tokenizer, tokenizer.eos_ids[0]) == ("<|end|>", b"<|end|>")
    assert token_text(tokenizer, 299) == ("", b"")
    llama = fallback()
    words = ["<0x0A>", "▁the", "</s>", "猫"]
    assert [token_text(llama, llama.tokenizer.token_to_id(w))[0] for w in words] == ["\n", " the", "</s>", "猫"]
