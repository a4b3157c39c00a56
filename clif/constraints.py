"""Answers that must be JSON: a grammar says which tokens may come next. Free of torch.

The library is llguidance: one wheel of Rust for every Python, which needs no other package, not even torch. So the
front end can refuse a schema before a request runs, and a replica enforces it. Its parser is lazy: a grammar is ready
in a millisecond, and a mask takes some ten microseconds. xgrammar computes masks ahead, which takes seconds for a new
schema, and needs torch and transformers.

Sources: Geng et al., "JSONSchemaBench" (2025), which compares such libraries; llguidance's documentation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import tokenizers

from clif.errors import InputError, plain
from clif.tokenizer import ChatTokenizer
from clif.types import Constraint

log = logging.getLogger(__name__)
ANY_OBJECT = '{"type": "object"}'
WHITESPACE = r"([ \t]?|\r?\n[ \t]{0,40})"
"""Between two symbols: a space, or a line break with an indentation. Without bounds, small models write no more."""
OPTIONS = {"whitespace_pattern": WHITESPACE, "whitespace_flexible": True, "lenient": False}
"""These hold whatever a schema says under x-guidance: what cannot be enforced is an error."""
KEPT = 16
"""Grammars that are kept for later requests with the same schema."""


def check_schema(schema: str) -> None:
    """Raise InputError for a JSON schema, as text, that cannot be enforced; the message says why."""
    library, grammar = _library(), _grammar(schema)
    wrong, messages = library.LLMatcher.validate_grammar_with_warnings(grammar, limits=_limits(library))
    if wrong:
        raise InputError(f"the JSON schema cannot be enforced ({plain(messages[0])}): change it")


class Grammars:
    """Makes what follows an answer, for one tokenizer. vocab_size: token ids of the model."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int) -> None:
        self._tokenizer, self.vocab_size = tokenizer, vocab_size
        self._compiled = lru_cache(KEPT)(self._compile)

    def follow(self, constraint: Constraint) -> Follower:
        """At the beginning of an answer. Raises InputError for a schema that cannot be enforced."""
        return Follower(self._compiled(constraint).deep_copy(), self.vocab_size)

    def _compile(self, constraint: Constraint) -> Any:
        library, tokens = _library(), self._tokens
        grammar = _grammar(constraint.schema or ANY_OBJECT)
        matcher = library.LLMatcher(tokens, grammar, log_level=0, limits=_limits(library))
        if matcher.is_error():
            raise InputError(f"the JSON schema cannot be enforced ({plain(matcher.get_error())}): change it")
        return matcher

    def prepare(self) -> None:
        """Read the vocabulary now, so that no answer waits for it. What prevents it is logged, and refuses constraints
        later.
        """
        try:
            _ = self._tokens
        except InputError as error:
            log.warning("no structured output: %s", error)

    @cached_property
    def _tokens(self) -> Any:
        """The vocabulary, as the library reads it: one to three seconds for 150,000 tokens."""
        # A copy: padding and truncation are no matter of the vocabulary.
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.tokenizer.to_str())
        copy.no_padding()
        copy.no_truncation()
        try:
            eos = list(self._tokenizer.eos_ids)
            return _library().LLTokenizer(copy.to_str(), n_vocab=self.vocab_size, eos_token=eos)
        except ValueError as error:
            raise InputError(
                f"the model's tokenizer is not fit for structured output ({plain(error)}): ask for plain text"
            ) from error


class Follower:
    """Where one answer is within its grammar. A token that the grammar does not allow is an error that stays."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._words = matcher, -(-vocab_size // 32)
        self._dead_end = False

    @property
    def error(self) -> str:
        """Why no token may follow; empty if one may. It quotes nothing of the answer: it is logged."""
        if self._dead_end or self._matcher.is_error():
            return "no token of the vocabulary continues an answer that its constraint allows: change the schema"
        return ""

    def advance(self, tokens: Sequence[int]) -> None:
        """These tokens follow, except for the end token: nothing follows that."""
        self._matcher.consume_tokens(list(tokens))

    def mask(self) -> bytes:
        """A bit for each token that may come next, least significant first, in words of 32. None is set: see error.

        The end token may where the answer is complete, and only there.
        """
        mask = b"" if self._matcher.is_error() else bytes(self._matcher.compute_bitmask())
        # A parser that has given up allows the end token, too.
        self._dead_end = not any(mask) or (self._matcher.is_stopped() and not self._matcher.is_accepting())
        return (b"" if self._dead_end else mask).ljust(4 * self._words, b"\0")


def _grammar(schema: str) -> str:
    try:
        return str(_library().LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS))
    except ValueError as error:
        raise InputError(f"the JSON schema is no JSON object ({plain(error)}): correct it") from error


def _limits(library: Any) -> Any:
    """Bounds of what a schema may cost: a state is up to 2 kB. Errors do not quote the answer: they are logged."""
    return library.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def _library() -> Any:
    """Imported when the first answer is constrained: nothing else needs it."""
    try:
        import llguidance
    except ImportError as error:
        raise InputError(
            "structured output needs the package llguidance, which is not installed here: pip install llguidance"
        ) from error
    return llguidance
