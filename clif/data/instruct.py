"""Instruction data: JSON lines to rows, rows to shards and to tokenised training samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from clif.data.lines import json_object, read_lines
from clif.errors import InputError, plain
from clif.tokenizer import ChatError, ChatTokenizer, Message
from clif.types import TrainSample

ACCEPTED = "instruction[/input]/output, messages, or prompt/completion"


class DataError(InputError):
    """The data cannot be used; the message names file and line and says what to change."""


class SampleRejected(DataError):
    """This row cannot be a training sample; other rows can. tokens: of a sample that is too long, otherwise 0."""

    def __init__(self, sentence: str, tokens: int = 0) -> None:
        super().__init__(sentence)
        self.tokens = tokens


class Marks(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a row says besides about its answer, for those who judge one. None: nothing.

    label: the whole answer in one line, where the row's own answer has more. schema: a JSON schema. test: a program
    that fails if the answer is wrong. check: a regular expression that a right answer has a match of. language: of
    code. category: the class that the row counts to.
    """

    label: str | None = None
    schema: dict[str, Any] | None = None
    test: str | None = None
    check: str | None = None
    language: str | None = None
    category: str | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One example: the prompt's messages and the answer. id counts the rows of the file from 0."""

    id: int
    messages: tuple[Message, ...]
    answer: str
    split: str | None = None
    client: str | None = None
    marks: Marks = Marks()


def read_rows(path: Path) -> list[Row]:
    """Read alpaca, chat or prompt/completion rows, one JSON object a line; blank lines are skipped.

    Raises DataError naming file and line.
    """
    rows: list[Row] = []
    for number, line in read_lines(path, DataError):
        try:
            rows.append(make_row(len(rows), json_object(line)))
        except InputError as error:
            raise DataError(f"{path}, line {number}: {plain(error)}") from error
    if not rows:
        raise DataError(f"{path} holds no rows: put one JSON object on each line")
    return rows


def split_rows(rows: Sequence[Row], split: str, needed: bool = True) -> list[Row]:
    """Rows of one split. Raises DataError, listing the existing splits, if rows are needed and there are none."""
    chosen = [row for row in rows if row.split == split]
    if not needed:
        return chosen
    if not chosen and all(row.split is None for row in rows):
        raise DataError(
            f'no row has the field "split", and "{split}" is needed: add it to every row, e.g. "split": "{split}", '
            "or set data.heldout_share=0.1, which holds out a tenth of rows that have none"
        )
    if not chosen:
        present = plain(", ".join(sorted({"(none)" if row.split is None else row.split for row in rows})))
        raise DataError(f'no row has the split "{split}": choose one that the data has ({present})')
    return chosen


def shard_rows(rows: Sequence[Row], how: Literal["round_robin", "client"], replica: int, replicas: int) -> list[Row]:
    """This replica's part of rows: every row in turn, or every client (sorted by name) in turn.

    Raises DataError if a replica would be left without rows, or if "client" is asked of rows without clients.
    """
    if not 0 <= replica < replicas:
        raise DataError(f"there is no replica {replica} among {replicas}: they count from 0")
    if how == "round_robin":
        if len(rows) < replicas:
            raise DataError(f"{len(rows)} training rows cannot be shared by {replicas} replicas: give more rows")
        return list(rows[replica::replicas])
    orphan = next((row for row in rows if row.client is None), None)
    if orphan is not None:
        raise DataError(f'row {orphan.id} has no "client": add the field, or set data.shard to round_robin')
    clients = sorted({row.client for row in rows if row.client is not None})
    if len(clients) < replicas:
        raise DataError(
            f"{len(clients)} clients cannot be shared by {replicas} replicas: "
            "use fewer replicas, or set data.shard to round_robin"
        )
    mine = set(clients[replica::replicas])
    return [row for row in rows if row.client in mine]


def encode_sample(row: Row, tokenizer: ChatTokenizer, max_tokens: int) -> TrainSample:
    """Prompt and answer as token ids, loss on the answer (and its end-of-text token) only; never truncated.

    Raises SampleRejected if it is longer than max_tokens or if no token of the answer is left to learn.
    """
    try:
        prompt, answer = tokenizer.encode_chat(row.messages), tokenizer.encode_answer(row.answer)
    except ChatError as error:
        raise SampleRejected(f"row {row.id}: {error}") from error
    # The end-of-text token alone teaches only empty answers, and no context predicts a first token.
    if len(answer) < 2 or not prompt:
        raise SampleRejected(f"row {row.id}: no target token: its prompt or its answer encodes to nothing")
    ids = (*prompt, *answer)
    if len(ids) > max_tokens:
        raise SampleRejected(
            f"row {row.id}: {len(ids)} tokens exceed {max_tokens}, the lesser of data.max_sample_tokens and "
            "model.max_context: raise it or shorten the row",
            len(ids),
        )
    return TrainSample(id=row.id, ids=ids, target_start=len(prompt))


def encode_samples(
    rows: Sequence[Row], tokenizer: ChatTokenizer, max_tokens: int
) -> tuple[list[TrainSample], list[str]]:
    """The samples that fit, and the reasons why the others were rejected."""
    samples: list[TrainSample] = []
    reasons: list[str] = []
    for row in rows:
        try:
            samples.append(encode_sample(row, tokenizer, max_tokens))
        except SampleRejected as rejected:
            reasons.append(str(rejected))
    return samples, reasons


def check_some_fit(rows: Sequence[Row], what: str, tokenizer: ChatTokenizer, max_tokens: int) -> None:
    """Raises DataError, with the reason, if no row can be a sample. what: the rows' name, in the plural.

    It stops at the first usable row, so that every rank can afford to check the rows of all replicas.
    """
    rejections: list[SampleRejected] = []
    for row in rows:
        try:
            encode_sample(row, tokenizer, max_tokens)
        except SampleRejected as rejected:
            rejections.append(rejected)
        else:
            return
    if rejections:
        # The shortest of the samples that are too long shows how far the limit must be raised.
        closest = min(rejections, key=lambda r: r.tokens or math.inf)
        raise DataError(f"none of the {len(rows)} {what} can be used; that which comes closest, {closest}")


def make_row(number: int, value: dict[str, Any]) -> Row:
    """The row that an object of one of the accepted kinds is. Raises DataError, without the position."""
    kinds = [read for keys, read in _KINDS.items() if value.keys() >= set(keys)]
    if len(kinds) != 1:
        found = ", ".join(value) or "none"
        problem = "row of more than one kind" if kinds else "unknown kind of row"
        raise DataError(f"{problem} (keys found: {found}): write {ACCEPTED}")
    messages, answer = kinds[0](value)
    if not answer.strip():
        raise DataError("row without an answer: add it or remove the row")
    client = value.get("client")
    if type(client) is int:  # many data sets number their clients
        value = {**value, "client": str(client)}
    return Row(
        id=number,
        messages=messages,
        answer=answer,
        split=_optional(value, "split"),
        client=_optional(value, "client"),
        marks=_marks(value),
    )


def _marks(value: dict[str, Any]) -> Marks:
    """Data sets use these names for other things, too: a field of another type says nothing about the answer."""
    schema, test = value.get("schema"), value.get("test")
    if isinstance(test, list) and all(isinstance(line, str) for line in test):
        test = "\n".join(test)
    category = next((value[key] for key in ("class", "category", "domain") if value.get(key) is not None), None)
    return Marks(
        label=_as_text(value.get("label")),
        schema=schema if isinstance(schema, dict) else None,
        test=test if isinstance(test, str) else None,
        check=_as_text(value.get("check")),
        language=_as_text(value.get("language")),
        category=_as_text(category),
    )


def _as_text(value: object) -> str | None:
    return str(value) if type(value) in (str, int) else None


def _alpaca(value: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    instruction, more = _text(value, "instruction"), _optional(value, "input")
    return _user(f"{instruction}\n\n{more}" if more else instruction), _text(value, "output")


def _completion(value: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    return _user(_text(value, "prompt")), _text(value, "completion")


def _chat(value: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    turns = value["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError('"messages" must be a list of {"role": ..., "content": ...}')
    messages = [{"role": _text(turn, "role"), "content": _text(turn, "content")} for turn in turns]
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError('row without an answer: the last of "messages" must have the role assistant')
    if len(messages) == 1:
        raise DataError('row without a prompt: put a user message before the answer in "messages"')
    return tuple(messages[:-1]), messages[-1]["content"]


def _user(content: str) -> tuple[Message, ...]:
    if not content.strip():
        raise DataError("row without a prompt: add it or remove the row")
    return ({"role": "user", "content": content},)


def _text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise DataError(f'"{key}" must be text, not {"missing" if key not in value else type(text).__name__}')
    return text


def _optional(value: dict[str, Any], key: str) -> str | None:
    return None if value.get(key) is None else _text(value, key)


_KINDS: dict[tuple[str, ...], Callable[[dict[str, Any]], tuple[tuple[Message, ...], str]]] = {
    ("instruction", "output"): _alpaca,
    ("messages",): _chat,
    ("prompt", "completion"): _completion,
}
