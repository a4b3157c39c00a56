"""Text to token ids and back, the same in the control process and in the replicas. Free of torch.

Rank 0 writes the model's tokenizer (a tokenizers.Tokenizer) and chat template to one small folder, so that the control
process needs neither torch nor transformers.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from clif.errors import InputError, plain

Message = dict[str, str]


class ChatError(InputError):
    """A conversation that the model's template or tokenizer refuses; the message says why."""


TOKENIZER_FILE = "tokenizer.json"
CHAT_FILE = "chat.json"
FALLBACK = re.compile("<0x[0-9A-Fa-f]{2}>")
"""The name of a token that is one byte, in tokenizers with byte fallback."""


class ChatTokenizer:
    """A tokenizer with its chat template and end-of-text ids.

    template: Jinja text, or None for a base model: then the contents are joined by newlines.
    eos_ids: any of them ends an answer; the first one is appended to training answers.
    special: names of the special tokens that templates use, e.g. bos_token.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        template: str | None,
        eos_ids: Sequence[int],
        special: dict[str, str] | None = None,
    ) -> None:
        if not eos_ids:
            raise InputError("the model names no end-of-text token: set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.template = template
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.special = special or {}

    @classmethod
    def load(cls, folder: Path) -> ChatTokenizer:
        """Read what save() wrote. Raises InputError if it is incomplete."""
        try:
            chat = json.loads((folder / CHAT_FILE).read_text())
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
            return cls(tokenizer, chat["template"], chat["eos_ids"], chat["special"])
        except Exception as error:  # tokenizers has no class of its own for a damaged file.
            raise InputError(f"{folder} holds no tokenizer that can be read ({error}): start the run anew") from error

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / TOKENIZER_FILE))
        chat = {"template": self.template, "eos_ids": list(self.eos_ids), "special": self.special}
        (folder / CHAT_FILE).write_text(json.dumps(chat, indent=1))

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text as it is, with the special tokens that the tokenizer puts around one. Raises ChatError."""
        return self._ids(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant answers. Raises ChatError."""
        if self._compiled is None:
            return self._ids("\n".join(m["content"] for m in messages) + "\n", add_special_tokens=True)
        # The template writes the special tokens itself: adding them again would double the first one.
        return self._ids(self._render(self._compiled, messages), add_special_tokens=False)

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an answer with the end-of-text token that closes it. Raises ChatError."""
        return [*self._ids(text, add_special_tokens=False), self.eos_ids[0]]

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            raise ChatError("half of a character (a lone surrogate) is no text: remove it") from error

    def _render(self, template: jinja2.Template, messages: Sequence[Message]) -> str:
        """The conversation as text. A template is a program of the model's authors: it may refuse, and it may fail."""
        try:
            return template.render(messages=list(messages), add_generation_prompt=True, **self.special)
        except _OF_TEMPLATES as error:
            roles = plain(", ".join(m["role"] for m in messages))
            raise ChatError(
                f"the model's chat template does not take messages of the roles {roles} ({plain(error)}): change them"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for inside of a text; the name of a special one. Empty for an id without a token."""
        name = self.tokenizer.id_to_token(token)
        if name is None:
            return b""
        if token in self._added:
            return str(name).encode()
        if "ByteLevel" in self._decoder and all(symbol in _BYTES for symbol in name):
            return bytes(_BYTES[symbol] for symbol in name)
        if "ByteFallback" in self._decoder and FALLBACK.fullmatch(name):
            return bytes.fromhex(name[3:5])
        return str(name.replace(_SPACE, " ") if _SPACE in self._decoder else name).encode()

    @cached_property
    def byte_level(self) -> bool:
        """Whether decode() joins the bytes of tokens and does nothing else: then text can be made from piece()."""
        return bool(self._decoder) and json.loads(self._decoder).get("type") == "ByteLevel"

    def piece(self, token: int) -> bytes:
        """What decode() joins: for a byte-level tokenizer the bytes of a token; none of a special one."""
        found = self._pieces.get(token)
        if found is None:
            name = self.tokenizer.id_to_token(token)
            left_out = name is None or token in self.special_ids
            found = self._pieces[token] = b"" if left_out else _bytes_of(str(name))
        return found

    @cached_property
    def _pieces(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The tokens that decode() leaves out."""
        return frozenset(i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    @cached_property
    def _decoder(self) -> str:
        """The decoder as JSON: it names what a token's symbols mean."""
        decoder = self.tokenizer.decoder
        return "" if decoder is None else bytes(decoder.__getstate__()).decode()

    @cached_property
    def _compiled(self) -> jinja2.Template | None:
        """The template in the environment that transformers documents for chat templates."""
        if self.template is None:
            return None
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
        try:
            return environment.from_string(self.template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InputError(f"the model's chat template is no valid Jinja ({error}): correct it") from error


def from_transformers(tokenizer: Any, eos_ids: Sequence[int]) -> ChatTokenizer:
    """Take over a Hugging Face tokenizer. Raises InputError if it has no fast (Rust) backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no fast tokenizer: add a tokenizer.json to the model's folder"
        )
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    # The answer's own end token comes first: generation configs may list others before it.
    ids = [i for i in (tokenizer.eos_token_id, *eos_ids) if i is not None]
    return ChatTokenizer(backend, template, ids, special)


def _byte_symbols() -> dict[str, int]:
    """The symbols by which byte-level tokenizers write bytes: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES, _SPACE = _byte_symbols(), "\u2581"


def _bytes_of(name: str) -> bytes:
    """Of a token of a byte-level tokenizer; one with other symbols stands for itself."""
    known = all(symbol in _BYTES for symbol in name)
    return bytes(_BYTES[symbol] for symbol in name) if known else name.encode()


# Errors of Jinja, and of Python for an expression in a template: "a" + none, a range that is too long.
_OF_TEMPLATES = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
