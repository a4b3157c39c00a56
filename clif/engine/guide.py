"""What changes the logits of one answer before a token is chosen: biases, penalties and a grammar. Free of torch.

It is a function of the request and of the tokens of its answer, so that a preempted answer and one of another replica
continue as if nothing had happened. All ranks of a replica have their own and reach the same result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from clif.constraints import Follower, Grammars
from clif.errors import InputError
from clif.tokenizer import ChatTokenizer
from clif.types import Request


class Guide:
    """Of one answer. follows: it depends on the answer's tokens, all of which must be known before the next one."""

    def __init__(self, request: Request, follower: Follower | None) -> None:
        sampling = self._sampling = request.sampling
        # How many tokens of prompt and answer it has taken in.
        self._at, self._follower = len(request.prompt), follower
        self._bias, self._counts = dict(sampling.logit_bias), Counter[int]()
        self._penalised = bool(sampling.frequency_penalty or sampling.presence_penalty)
        self.follows = self._penalised or follower is not None

    @property
    def error(self) -> str:
        """Why no token can be chosen any more; empty if one can."""
        return "" if self._follower is None else self._follower.error

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in what is new of the prompt's and the answer's tokens."""
        new, self._at = tokens[self._at :], max(self._at, len(tokens))
        if self._penalised:
            self._counts.update(new)
        if self._follower is not None and new:
            self._follower.advance(new)

    def bias(self) -> dict[int, float]:
        """What to add to the logits of tokens."""
        if not self._counts:
            return self._bias
        frequency, presence = self._sampling.frequency_penalty, self._sampling.presence_penalty
        penalties = {token: -presence - frequency * count for token, count in self._counts.items()}
        return {**penalties, **{token: value + penalties.get(token, 0.0) for token, value in self._bias.items()}}

    def mask(self) -> bytes | None:
        """See Follower.mask(). None: every token may come next."""
        return None if self._follower is None else self._follower.mask()


class Guides:
    """Makes the guides of requests. vocab_size: token ids of the model."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int) -> None:
        self._vocab_size, self._grammars = vocab_size, Grammars(tokenizer, vocab_size)

    def prepare(self) -> None:
        """Do what would hold up the first constrained answer."""
        self._grammars.prepare()

    def __call__(self, request: Request) -> Guide | None:
        """None if it asks for nothing of this. Raises InputError for what cannot be enforced."""
        sampling = request.sampling
        if not sampling.guided:
            return None
        for token, _ in sampling.logit_bias:
            if not 0 <= token < self._vocab_size:
                raise InputError(f"logit_bias names token {token}: the model has the ids 0 to {self._vocab_size - 1}")
        return Guide(request, self._grammars.follow(sampling.constraint) if sampling.constraint else None)
