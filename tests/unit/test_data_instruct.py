"""Instruction data: every accepted row form, errors that name the place, shards that lose nothing."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clif.data.instruct import (
    DataError,
    Marks,
    Row,
    SampleRejected,
    check_some_fit,
    encode_sample,
    encode_samples,
    read_rows,
    shard_rows,
    split_rows,
)
from clif.tokenizer import ChatTokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture
def tokenizer(byte_tokenizer: ChatTokenizer) -> ChatTokenizer:
    return byte_tokenizer


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


GOOD = {"prompt": "p", "completion": "c"}


def rows_of(*clients: str | None) -> list[Row]:
    return [Row(id=i, messages=(user("q"),), answer="a", client=c) for i, c in enumerate(clients)]


def test_every_accepted_form_becomes_prompt_and_answer(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {"instruction": "Do", "output": "done", "split": "train", "client": "c1", "domain": "x"},
        {"instruction": "Do", "input": "this", "output": "done", "split": "test", "client": 3},
        "",
        {"messages": [{"role": "system", "content": "s"}, user("u"), assistant("one"), user("v"), assistant("two")]},
        GOOD | {"split": None},
    )
    assert read_rows(path) == [
        Row(id=0, messages=(user("Do"),), answer="done", split="train", client="c1", marks=Marks(category="x")),
        Row(id=1, messages=(user("Do\n\nthis"),), answer="done", split="test", client="3"),
        Row(id=2, messages=({"role": "system", "content": "s"}, user("u"), assistant("one"), user("v")), answer="two"),
        Row(id=3, messages=(user("p"),), answer="c"),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "p", ', "not valid JSON"),
        ("[1]", "a list instead of an object"),
        ({"question": "q", "answer": "a"}, r"unknown kind of row \(keys found: question, answer\): write instruction"),
        ({"prompt": "p", "completion": "c", "messages": []}, "more than one kind"),
        ({"prompt": "p", "completion": " "}, "row without an answer"),
        ({"instruction": "i", "output": ""}, "row without an answer"),
        ({"messages": [user("u")]}, "row without an answer"),
        ({"messages": [user("u"), assistant("")]}, "row without an answer"),
        ({"messages": [assistant("a")]}, "row without a prompt"),
        ({"messages": "u"}, '"messages" must be a list'),
        ({"messages": [{"role": "user"}, assistant("a")]}, '"content" must be text, not missing'),
        ({"prompt": "", "completion": "c"}, "row without a prompt"),
        ({"prompt": 3, "completion": "c"}, '"prompt" must be text, not int'),
        (GOOD | {"client": 3.5}, '"client" must be text, not float'),
        ('{"prompt": "x \\ud83d", "completion": "c"}', r"\\ud83d is half of a character"),
        ('{"prompt": "x", "completion": "\\ude00\\ud83d"}', r"\\ude00 is half of a character"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": "p", "completion": "c", "id": ' + "9" * 5000 + "}", "holds a number that is too large"),
    ],
)
def test_a_bad_row_is_an_error_that_names_file_line_and_cause(tmp_path, line, expected):
    path = write(tmp_path / "bad.jsonl", GOOD, "", line)
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 3: .*{expected}"):
        read_rows(path)


def test_a_file_that_is_empty_or_not_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(write(tmp_path / "empty.jsonl"))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_rows(binary)


def test_a_missing_split_is_an_error_that_lists_those_present():
    rows = [Row(id=i, messages=(user("q"),), answer="a", split=s) for i, s in enumerate(("train", "test", None))]
    assert [row.id for row in split_rows(rows, "test")] == [1]
    with pytest.raises(DataError, match=r'"dev".*\(none\), test, train'):
        split_rows(rows, "dev")
    assert split_rows(rows, "dev", needed=False) == []


def test_rows_without_any_split_are_an_error_that_says_what_to_add():
    with pytest.raises(DataError, match=r'"split": "train", or set data\.heldout_share=0\.1'):
        split_rows(rows_of("a", "b"), "train")


def test_a_file_that_cannot_be_opened_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read \(No such file or directory\)"):
        read_rows(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        read_rows(tmp_path)


def test_whole_pairs_and_escaped_backslashes_are_no_halves(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"prompt": "\\ud83d\\ude00", "completion": "\\\\ud83d \\u00e9"}')
    (row,) = read_rows(path)
    assert (row.messages[0]["content"], row.answer) == ("\U0001f600", "\\ud83d é")


def test_loss_is_on_the_answer_and_its_end_only(tokenizer):
    sample = encode_sample(Row(id=7, messages=(user("hé"),), answer="ja"), tokenizer, 100)
    assert tokenizer.decode(sample.ids[: sample.target_start]) == "<user>hé<assistant>"
    assert sample.ids[sample.target_start :] == (*tokenizer.tokenizer.encode("ja").ids, 256)
    assert (sample.id, sample.targets) == (7, 3)


def test_a_sample_that_never_fits_is_rejected_with_a_reason_and_the_others_stay(tokenizer):
    rows = [Row(id=i, messages=(user("q"),), answer="a" * n) for i, n in enumerate((1, 50, 2))]
    longest = len("<user>q<assistant>") + 3
    samples, reasons = encode_samples(rows, tokenizer, longest)
    assert [sample.id for sample in samples] == [0, 2]
    assert len(reasons) == 1
    assert reasons[0].startswith(f"row 1: {longest + 48} tokens exceed {longest}, the lesser of data.max_sample_tokens")


def test_rows_of_which_none_fits_are_an_error_that_says_how_far_the_limit_must_go(tokenizer):
    rows = [Row(id=i, messages=(user("q"),), answer="a" * n) for i, n in enumerate((50, 20, 70))]
    sentence = r"none of the 3 training rows of replica 1 can be used; .* row 1: 39 tokens exceed 30, .*: raise it"
    with pytest.raises(DataError, match=sentence):
        check_some_fit(rows, "training rows of replica 1", tokenizer, 30)
    check_some_fit(rows, "training rows", tokenizer, 39)
    check_some_fit([], "training rows", tokenizer, 39)


def test_a_row_that_the_chat_template_refuses_is_rejected_and_the_others_stay(tokenizer):
    strict = ChatTokenizer(tokenizer.tokenizer, "{{ raise_exception('no ' + messages[0]['role']) }}", [256])
    with pytest.raises(SampleRejected, match=r"row 0: .* does not take messages of the roles user \(no user\)"):
        encode_sample(rows_of("a")[0], strict, 100)


def test_a_sample_without_target_tokens_is_rejected(tokenizer):
    with pytest.raises(SampleRejected, match="row 0: no target token"):
        encode_sample(Row(id=0, messages=(user("q"),), answer=""), tokenizer, 100)


@given(st.lists(st.sampled_from("abcdefg"), min_size=1), st.integers(1, 6), st.sampled_from(("round_robin", "client")))
def test_shards_hold_every_row_once_and_no_client_twice(clients, replicas, how):
    rows = rows_of(*clients)
    if (len(rows) if how == "round_robin" else len(set(clients))) < replicas:
        with pytest.raises(DataError, match=f"cannot be shared by {replicas} replicas"):
            shard_rows(rows, how, 0, replicas)
        return
    shards = [shard_rows(rows, how, replica, replicas) for replica in range(replicas)]
    assert all(shards)
    assert sorted(row.id for shard in shards for row in shard) == [row.id for row in rows]
    if how == "client":
        owners = [{row.client for row in shard} for shard in shards]
        assert sum(map(len, owners)) == len(set(clients))


def test_client_shards_need_clients():
    with pytest.raises(DataError, match='row 1 has no "client"'):
        shard_rows(rows_of("a", None), "client", 0, 1)
    with pytest.raises(DataError, match="no replica 2 among 2"):
        shard_rows(rows_of("a", "b"), "client", 2, 2)


def test_real_data_sets_are_read_whole():
    folder = SHARED / "data" / "instruct"
    if not folder.is_dir():
        pytest.skip("../shared/data/instruct is not here")
    rows = read_rows(folder / "dolly_fed10_short.jsonl")
    assert len(rows) == 9997
    assert sum(len(shard_rows(rows, "client", replica, 4)) for replica in range(4)) == 9997
    assert len(read_rows(folder / "homeassistant_toolcalls.jsonl")) == 2357
