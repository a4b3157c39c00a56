"""Promises of constrained answers: whatever a model prefers, an answer that ends is JSON of its schema."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest
import tokenizers

from clif.constraints import Follower, Grammars, check_schema
from clif.errors import InputError
from clif.models.bytes_tokenizer import byte_tokenizer
from clif.tokenizer import ChatTokenizer
from clif.types import Constraint

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["a", "bc", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def is_person(text: str) -> bool:
    found = json.loads(text)
    assert list(found) == ["name", "age", "kind", "tags"]
    assert isinstance(found["name"], str) and len(found["name"]) <= 6 and found["kind"] in ("a", "bc", None)
    assert type(found["age"]) is int and 0 <= found["age"] <= 120
    return len(found["tags"]) <= 3 and all(type(tag) is bool for tag in found["tags"])


def of_bytes() -> Grammars:
    return Grammars(byte_tokenizer(300), 300)


def of_model(folder: str) -> Grammars:
    return Grammars(ChatTokenizer(tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json"), None, [2]), 512)


def allowed(follower: Follower, vocab_size: int) -> list[int]:
    bits = np.unpackbits(np.frombuffer(follower.mask(), np.uint8), bitorder="little")
    assert len(bits) % 32 == 0 and not bits[vocab_size:].any()
    return [int(token) for token in bits.nonzero()[0]]


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("schema", [json.dumps(PERSON), json.dumps({**PERSON, "x-guidance": {"lenient": True}})])
def test_any_choice_of_allowed_tokens_ends_as_json_of_the_schema(request, real, schema):
    grammars = of_model(request.getfixturevalue("stories")) if real else of_bytes()
    tokenizer, rng = grammars._tokenizer, random.Random(1)
    for _ in range(20):
        follower, ids = grammars.follow(Constraint("json_schema", schema)), []
        while not ids or ids[-1] not in tokenizer.eos_ids:
            follower.advance(ids[-1:])
            ids.append(rng.choice(allowed(follower, grammars.vocab_size)))
            assert len(ids) < 2000, "white space is bounded, and so is all else"
        assert is_person(tokenizer.decode(ids)) and not follower.error


def test_the_end_is_allowed_where_the_answer_is_complete_and_only_there():
    grammars = of_bytes()
    follower, end = grammars.follow(Constraint("json_object")), grammars._tokenizer.eos_ids[0]
    for token in grammars._tokenizer.encode_text('{"a": [1, "x"]}'):
        assert token in allowed(follower, 300) and end not in allowed(follower, 300)
        follower.advance([token])
    assert allowed(follower, 300) == [end]


def test_white_space_is_a_space_or_a_line_break_with_an_indentation():
    grammars = of_bytes()
    encode = grammars._tokenizer.encode_text
    for text, fine in (
        ('{"a": 1, "b":[2]}', True),
        ('{\n  "a": [\n    1\n  ]\n}', True),
        ('{  "a"', False),
        ("{\n\n", False),
    ):
        follower = grammars.follow(Constraint("json_object"))
        follower.advance(encode(text))
        assert (follower.error == "") is fine, text


def test_answers_with_one_schema_follow_it_independently_and_a_text_at_once_is_as_its_tokens():
    grammars = of_bytes()
    first, second = (grammars.follow(Constraint("json_object")) for _ in range(2))
    ids = grammars._tokenizer.encode_text('{"a": ')
    first.advance(ids)
    assert allowed(second, 300) == allowed(grammars.follow(Constraint("json_object")), 300)
    for token in ids:
        second.advance([token])
    assert first.mask() == second.mask()


def test_a_token_that_is_not_allowed_is_an_error_that_stays():
    grammars = of_bytes()
    follower = grammars.follow(Constraint("json_object"))
    follower.advance(grammars._tokenizer.encode_text("no"))
    assert follower.error and not any(follower.mask()) and len(follower.mask()) == 4 * -(-300 // 32)
    follower.advance(grammars._tokenizer.encode_text("{"))
    assert not any(follower.mask())


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ("{", "is no JSON object"),
        ("[]", "is no JSON object"),
        ('{"type": "person"}', "Invalid type: person"),
        ('{"not": {"type": "string"}}', "Unimplemented"),
        ('{"x-guidance": {"lenient": true}, "not": {"type": "string"}}', "Unimplemented"),
        ('{"$ref": "http://x/y"}', "not present"),
        ('{"type": "string", "pattern": "("}', "regex"),
        ('{"enum": []}', "Unsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_before_a_request_runs_and_by_a_replica(schema, why):
    with pytest.raises(InputError, match=why):
        check_schema(schema)
    with pytest.raises(InputError, match=why):
        of_bytes().follow(Constraint("json_schema", schema))


def test_schemas_that_can_be_enforced_are_taken():
    for schema in (json.dumps(PERSON), "{}", '{"type": "array", "items": {"$ref": "#/$defs/x"}, "$defs": {"x": {}}}'):
        check_schema(schema)


@pytest.mark.parametrize(
    ("kind", "schema", "why"),
    [
        ("json_object", "{}", "belongs to the kind"),
        ("json_schema", "", "belongs to the kind"),
        ("regex", "a", "it must be json_object or json_schema"),
        ("json_schema", " " * 70_000, "70000 characters"),
    ],
)
def test_impossible_constraints_are_refused(kind, schema, why):
    with pytest.raises(ValueError, match=why):
        Constraint(kind, schema)


def test_a_vocabulary_that_was_read_ahead_is_not_read_again_and_without_the_library_it_is_logged(monkeypatch, caplog):
    grammars, none = of_bytes(), of_bytes()
    grammars.prepare()
    read = grammars._tokens
    grammars.follow(Constraint("json_object"))
    assert grammars._tokens is read and not caplog.records
    monkeypatch.setitem(sys.modules, "llguidance", None)
    none.prepare()
    assert "no structured output" in caplog.text and "pip install llguidance" in caplog.text


def test_without_the_library_a_constraint_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match="pip install llguidance"):
        check_schema("{}")
