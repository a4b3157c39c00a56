"""CLIF as a library: a model with its adapters in this process, without a cluster.

    from clif import LLM, Sampling

    with LLM("path-or-hub-name") as llm:
        for answer in llm.generate(["Once upon a time", "In the beginning"], Sampling(max_tokens=40)):
            print(answer.text)

It is the engine that a replica runs, with the same batches and the same tokens; there is no training, no other process
and no network.
"""

from __future__ import annotations

import copy
import gc
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from clif.adapters.cache import AdapterCache
from clif.adapters.peft_io import read_rank
from clif.config import Config, config_from_tree
from clif.config.shipped import shipped_path
from clif.distributed.topology import choose_device
from clif.engine.engine import Engine
from clif.errors import InputError
from clif.models.hf_config import longest_context
from clif.models.weights.files import locate, read_model
from clif.models.weights.kept_forms import KEPT
from clif.models.weights.loading import LoadedModel, load_model
from clif.prompts import Prompt, as_list, one_for_each, prompt_ids
from clif.text_stream import TextStream
from clif.types import FinishReason, Request, Sampling, TokenEvent, TokenLogprob

Adapter = str | Path | None
Section = Mapping[str, Any]
CONTEXT = 2048
"""Upper bound of the default context, prompt and answer, tokens."""
RANK = 16


@dataclass(frozen=True)
class Completion:
    """An answer. adapter_version: 0 is the base model; each export of an adapter that is loaded gets a new one.

    token_ids: including the end token, if there is one. detail: the reason if finish_reason is failed. logprobs: one
    for each token, if Sampling.logprobs asks for them; prompt_logprobs: of the prompt's tokens after the first.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    adapter_version: int
    detail: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class StreamEvent:
    """New tokens of an answer, with their log-probabilities. index: of the prompt; finish_reason: in the last event.

    text: whole characters, without a possible beginning of a stop string. It may be empty.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    adapter_version: int
    finish_reason: FinishReason | None = None
    detail: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


class LLM:
    """A loaded model, of one process and one thread. Close it, or use it in a `with` block.

    path: a hub name, a folder, a .gguf file or random:<config.json>. adapters: names for PEFT folders.
    model, adapter, engine: fields of these sections of the configuration, e.g. engine={"max_batch": 32}; by default the
    longest context is the model's own, but not above 2048 tokens, and adapters have a rank of 16 at most. loaded: what
    `path` names, where it was loaded before; it is taken apart, and serves no second LLM.
    Raises InputError for a model or a setting that cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        model: Section | None = None,
        adapter: Section | None = None,
        engine: Section | None = None,
        loaded: LoadedModel | None = None,
    ) -> None:
        self._names = {name: Path(folder) for name, folder in (adapters or {}).items()}
        self.config = _config(shipped_path(str(path)), self._names, model or {}, adapter or {}, engine or {})
        loaded = loaded or _load(self.config)
        self.tokenizer = loaded.tokenizer
        self._engine: Engine | None = Engine.from_config(self.config, loaded)
        self._vocab_size = self._engine.runner.stack.vocab_size
        self._cache = AdapterCache(self._engine.runner.bank, self._engine.scheduler.slots)
        self._ids = itertools.count()
        self._events: dict[int, _Events] = {}
        self._cache.versions_of([*self._names.values()])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        adapter: Adapter | Sequence[Adapter] = None,
    ) -> list[Completion]:
        """An answer to each prompt, in their order; a single prompt gets a list of one.

        sampling, adapter: for all prompts, or one for each. adapter: a PEFT folder, a name of `adapters`, or None for
        the base model; several are served in one batch. Raises InputError before anything is computed.
        """
        answers = self._checked(prompts, sampling, adapter)
        with self._running(answers, {answer.request.id: answer for answer in answers}):
            while any(answer.finish is None for answer in answers):
                self._step()
        return [answer.completion() for answer in answers]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        adapter: Adapter | Sequence[Adapter] = None,
    ) -> Iterator[StreamEvent]:
        """As generate(), with an event for each new token. Closing it cancels the unfinished answers.

        It begins, and loads adapters, with its first event. Several streams, and generate(), may be used alternately:
        the one in use computes for all.
        """
        return self._run(self._checked(prompts, sampling, adapter))

    def close(self) -> None:
        """Cancel running requests and free the memory."""
        if self._engine is None:
            return
        for request_id in [*self._events]:
            self._engine.scheduler.cancel(request_id)
        self._engine.close()
        device, self._engine = self._engine.runner.device, None
        del self._cache
        # An engine and its parts refer to each other.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _opened(self) -> Engine:
        if self._engine is None:
            raise InputError("this LLM is closed: make another one")
        return self._engine

    def _checked(self, prompts: object, sampling: object, adapter: object) -> list[_Answer]:
        """Check the arguments before any work. Raises InputError."""
        self._opened()
        given = as_list(prompts)
        wanted = [Sampling() if s is None else s for s in one_for_each(sampling, len(given), "sampling", Sampling)]
        chosen = [self._folder(a) for a in one_for_each(adapter, len(given), "adapter", (str, Path))]
        ids = [self._encode(prompt, index) for index, prompt in enumerate(given)]
        answers = []
        for index, (one, params, folder) in enumerate(zip(ids, wanted, chosen, strict=True)):
            self._check_room(index, len(one), params.max_tokens)
            request = Request(id=next(self._ids), prompt=tuple(one), sampling=params)
            self._opened().scheduler.guide_of(request)
            answers.append(_Answer(index, request, folder, TextStream(self.tokenizer, params.stop)))
        return answers

    def _begin(self, answers: list[_Answer], events: Mapping[int, _Events]) -> None:
        """Load all adapters before the first request is added."""
        engine = self._opened()
        versions = self._cache.versions_of([answer.folder for answer in answers if answer.folder is not None])
        for answer in answers:
            answer.version = 0 if answer.folder is None else versions[answer.folder]
            sink = self._events[answer.request.id] = events[answer.request.id]
            refused = engine.scheduler.add(answer.request, engine.clock(), version=answer.version)
            if refused is not None:
                sink.append(refused)

    @contextmanager
    def _running(self, answers: list[_Answer], events: Mapping[int, _Events]) -> Iterator[None]:
        """Their requests run, and what happens to them goes to `events`, by id; at the end none runs any more."""
        self._begin(answers, events)
        try:
            yield
        finally:
            for answer in answers:
                if self._events.pop(answer.request.id, None) is not None and answer.finish is None and self._engine:
                    self._engine.scheduler.cancel(answer.request.id)

    def _run(self, answers: list[_Answer]) -> Iterator[StreamEvent]:
        """Compute until all of these answers are complete."""
        events: dict[int, deque[TokenEvent]] = {answer.request.id: deque() for answer in answers}
        with self._running(answers, events):
            while any(answer.finish is None for answer in answers):
                for answer in answers:
                    while answer.finish is None and events[answer.request.id]:
                        yield answer.take(events[answer.request.id].popleft())
                if any(answer.finish is None for answer in answers):
                    self._step()

    def _step(self) -> None:
        """One step, for the requests of all streams."""
        for event in self._opened().serve():
            events = self._events.get(event.request_id)
            if events is not None:
                events.append(event)

    def _folder(self, adapter: str | Path | None) -> Path | None:
        return None if adapter is None else self._names.get(str(adapter), Path(adapter))

    def _encode(self, prompt: Any, index: int) -> list[int]:
        ids = prompt_ids(self.tokenizer, prompt, index)
        if not ids:
            raise InputError(f"prompt {index} has no tokens: give one at least")
        if not 0 <= min(ids) <= max(ids) < self._vocab_size:
            raise InputError(f"prompt {index} has a token id outside of the vocabulary, 0 to {self._vocab_size - 1}")
        return ids

    def _check_room(self, index: int, prompt: int, answer: int) -> None:
        most = self.config.model.max_context
        if prompt + answer > most:
            raise InputError(
                f"prompt {index} has {prompt} tokens and may be answered with {answer}, together more than the longest "
                f"context of {most}: shorten it, lower max_tokens, or give LLM(model={{'max_context': ...}})"
            )


class _Events(Protocol):
    """Where the events of a request go."""

    def append(self, event: TokenEvent, /) -> object: ...


@dataclass
class _Answer:
    """A growing answer."""

    index: int
    request: Request
    folder: Path | None
    text: TextStream
    version: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    detail: str = ""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def take(self, event: TokenEvent) -> StreamEvent:
        new = self.text.take(event)
        self.logprobs += event.logprobs
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.finish, self.detail = event.finish, event.detail
        return StreamEvent(self.index, new, event.tokens, self.version, event.finish, event.detail, event.logprobs)

    def append(self, event: TokenEvent) -> None:
        """Take an event of an answer whose text is made at its end only."""
        if event.finish is not None:
            self.take(event)
            return
        self.text.ids += event.tokens
        self.logprobs += event.logprobs
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs

    def completion(self) -> Completion:
        assert self.finish is not None
        ids, logprobs = tuple(self.text.ids), tuple(self.logprobs)
        return Completion(self.text.sent, ids, self.finish, self.version, self.detail, logprobs, self.prompt_logprobs)


def load_for(config: Config, kinds: Sequence[str]) -> Iterator[tuple[Config, LoadedModel]]:
    """The model of a configuration for an LLM with weights of each of these types, and the configuration of that LLM.

    What is quantised here is a copy of the plain weights, since transformers takes long over a GGUF file: the model is
    held twice. Weights as their file has them are loaded by themselves. Raises ConfigError.
    """
    plain: LoadedModel | None = None
    copied = [kind for kind in kinds if kind != KEPT]
    for kind in kinds:
        typed = config.model_copy(update={"model": config.model.model_copy(update={"weight_dtype": kind})})
        if kind == KEPT:
            yield typed, _load(typed)
            continue
        plain = plain or _load(typed)
        yield typed, plain if kind == copied[-1] else replace(plain, model=copy.deepcopy(plain.model))


def _load(config: Config) -> LoadedModel:
    return load_model(config.model, choose_device(config.model.device, 0), config.run.seed)


def _config(path: str, adapters: Mapping[str, Path], model: Section, adapter: Section, engine: Section) -> Config:
    """The configuration of a run that only serves. Raises InputError."""
    if "max_context" not in model:
        model = {"max_context": min(CONTEXT, _longest(path) or CONTEXT), **model}
    if "r" not in adapter:
        adapter = {"r": max([RANK, *(read_rank(folder) for folder in adapters.values())]), **adapter}
    if len(adapters) > 2 and "serving_slots" not in adapter:
        adapter = {"serving_slots": len(adapters), **adapter}
    sections = {"model": {"path": path, **model}, "adapter": dict(adapter), "engine": dict(engine)}
    return config_from_tree({**sections, "train": {"enabled": False}})


def _longest(path: str) -> int | None:
    local = locate(path)
    if local is not None:
        return longest_context(read_model(local))
    import transformers

    from clif.models.guard import reading

    with reading(f"model.path {path}"):
        return longest_context(transformers.AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict())
