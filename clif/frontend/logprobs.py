"""Log-probabilities in the forms of OpenAI's protocol. They come from the model as it is, whatever the sampling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from clif.text_stream import token_text
from clif.tokenizer import ChatTokenizer
from clif.types import TokenLogprob


def chat_logprobs(tokenizer: ChatTokenizer, tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Of conversations, and of responses."""
    content = [
        {
            **_shown(tokenizer, token.token, token.logprob),
            "top_logprobs": [_shown(tokenizer, other, logprob) for other, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _shown(tokenizer: ChatTokenizer, token: int, logprob: float) -> dict[str, Any]:
    text, data = token_text(tokenizer, token)
    return {"token": text, "logprob": logprob, "bytes": list(data)}


def plain_logprobs(
    tokenizer: ChatTokenizer, tokens: Iterable[TokenLogprob], offset: int, first: int | None = None
) -> dict[str, Any]:
    """Of plain completions. offset: characters of the text before these tokens; end, those after them, is besides.

    first: a token before these that has no log-probability, since nothing comes before it.

    A token whose text another one of the likeliest has, too, is shown once, with the greater value.
    """
    texts, logprobs, top, offsets = list[str](), list[float | None](), list[dict[str, float] | None](), list[int]()
    if first is not None:
        texts, logprobs, top, offsets = [token_text(tokenizer, first)[0]], [None], [None], [offset]
        offset += len(texts[0])
    for token in tokens:
        text = token_text(tokenizer, token.token)[0]
        texts.append(text)
        logprobs.append(token.logprob)
        offsets.append(offset)
        offset += len(text)
        likeliest = dict[str, float]()
        for other, logprob in ((token.token, token.logprob), *token.top):
            name = token_text(tokenizer, other)[0]
            likeliest[name] = max(logprob, likeliest.get(name, logprob))
        top.append(likeliest)
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets, "end": offset}
