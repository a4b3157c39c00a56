"""The text of an answer as it grows, token by token, and that of a single token. Free of torch."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from clif.tokenizer import FALLBACK, ChatTokenizer
from clif.types import TokenEvent

WINDOW, CUT = 12, 4
"""Tokens that are decoded together, mostly; and how many of them begin the next window. No character is longer."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes the tokens of one answer incrementally: the pieces add up to what decoding all of them gives.

    stop: strings that end the answer; what may be the beginning of one is held back. So is an unfinished character,
    and a run of single bytes: these become characters only if the whole run is valid.

    tokenizers has a DecodeStream, too. It raises an error for such a run that is not valid.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.sent = ""
        self._tokenizer, self._keep = tokenizer, max(map(len, stop), default=1) - 1
        # shown: characters of the window's text that have left it; held: those that wait for a stop string.
        self._window: list[int] = []
        self._shown, self._held = 0, ""
        # Where text is nothing but bytes, each is decoded once.
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.byte_level else None

    def add(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; it may be empty."""
        self.ids += ids
        for token in ids:
            self._held += self._step(token)
        cut = max(0, len(self._held) - self._keep)
        ready, self._held = self._held[:cut], self._held[cut:]
        self.sent += ready
        return ready

    def end(self, text: str | None = None) -> str:
        """The rest of the answer. text: the whole answer, where a stop string cut it."""
        whole = self._tokenizer.decode(self.ids) if text is None else text
        rest = whole[len(self.sent) :]
        self.sent += rest
        return rest

    def take(self, event: TokenEvent) -> str:
        """The text that an event of the answer adds, the rest with its last event."""
        if event.finish is None:
            return self.add(event.tokens)
        # Not added: its text may be the end of a stop string.
        self.ids += event.tokens
        return self.end(event.text)

    def _step(self, token: int) -> str:
        if self._bytes is not None:
            return self._bytes.decode(self._tokenizer.piece(token))
        self._window.append(token)
        if self._waits(token):
            return ""
        text = self._tokenizer.decode(self._window)
        end = len(text) - text.endswith(UNFINISHED)
        ready, self._shown = text[self._shown : end], max(self._shown, end)
        if len(self._window) > WINDOW and not self._waits(self._window[-CUT]):
            self._cut(len(text) - self._shown)
        return ready

    def _cut(self, unshown: int) -> None:
        """Begin a window with the last tokens: their text ends with the same characters, if they have any."""
        window = self._window[-CUT:]
        text = self._tokenizer.decode(window)
        if len(text) > unshown:
            self._window, self._shown = window, len(text) - unshown

    def _waits(self, token: int) -> bool:
        """It is one byte, which decoders join with its neighbours (byte fallback), or it is special and left out."""
        name = self._tokenizer.tokenizer.id_to_token(token)
        return name is None or token in self._tokenizer.special_ids or FALLBACK.fullmatch(name) is not None


def cut_at_stop(decode: Callable[[list[int]], str], ids: list[int], stop: Sequence[str]) -> str | None:
    """The text of these tokens before the first stop string; None without one. Without the last token there was none.

    Decodes the end alone where that says enough: an answer of thousands of tokens gets one token after the other.
    """
    longest = max(map(len, stop))
    if len(ids) > 4 * longest + WINDOW and not _may_end(decode, ids[-4 * longest - WINDOW :], stop, longest):
        return None
    text = decode(ids)
    cuts = [at for at in (text.find(one) for one in stop) if at >= 0]
    return text[: min(cuts)] if cuts else None


def _may_end(decode: Callable[[list[int]], str], tail: list[int], stop: Sequence[str], longest: int) -> bool:
    """Whether a stop string may end with the last token: there is one, or the tail does not say.

    It does not if it begins within a character, or if too little text lies before the tokens of the last character,
    of which three bytes may be there.
    """
    text = decode(tail)
    broken = UNFINISHED in text[:-3] or any(UNFINISHED in one for one in stop)
    return broken or len(decode(tail[:-CUT])) <= longest or any(one in text for one in stop)


def token_text(tokenizer: ChatTokenizer, token: int) -> tuple[str, bytes]:
    """A token's text, and its bytes: those of an answer's tokens, joined, are its text. Special ones have their names.

    An id without a token has neither. The text of a part of a character is U+FFFD.
    """
    data = tokenizer.token_bytes(token)
    return data.decode(errors="replace"), data
