"""Where the answers of `clif eval` come from: the library in this process, or a server. torch is imported when used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec

from clif.adapters.store import AdapterStore
from clif.clients.endpoint import CONNECT_S, Endpoint, message_of, said
from clif.config import Config
from clif.data.instruct import Row, encode_sample
from clif.errors import InputError
from clif.quality.work import Answer
from clif.tokenizer import ChatTokenizer
from clif.types import Sampling, TrainSample

if TYPE_CHECKING:
    from clif.llm import LLM

READ = Sampling(max_tokens=1, logprobs=0, prompt_logprobs=True)
"""Of a known answer behind its prompt: nothing is answered, but the shortest answer is one token."""
TOKENIZER_FOLDER = "tokenizer"
AT_A_TIME = 8
SILENT_S = 300.0
BATCH = 32
"""Requests of a step at least: no client waits for a single answer, and few rows take a step almost as long as many."""


class LibraryAnswers:
    """Answers by `clif.LLM`, whose adapters are named by their versions. weights: type of the base's."""

    def __init__(self, llm: LLM, weights: str, max_tokens: int) -> None:
        self._llm, self.weights = llm, weights
        self._sampling = Sampling(max_tokens=max_tokens)

    @property
    def tokenizer(self) -> ChatTokenizer:
        return self._llm.tokenizer

    def answer(self, rows: Sequence[Row], version: int, loss: bool) -> list[Answer]:
        """Raises InputError for a row that does not fit the longest context."""
        adapter = str(version) if version else None
        found = self._llm.generate([row.messages for row in rows], self._sampling, adapter)
        answers = [Answer.of(row, one.text) for row, one in zip(rows, found, strict=True)]
        return self._with_losses(answers, rows, adapter) if loss else answers

    def _with_losses(self, answers: list[Answer], rows: Sequence[Row], adapter: str | None) -> list[Answer]:
        samples = known_answers(rows, self.tokenizer, self._llm.config.model.max_context)
        read = self._llm.generate([sample.ids for sample in samples], READ, adapter)
        logprobs = ([None, *(token.logprob for token in one.prompt_logprobs)] for one in read)
        return list(map(with_loss, answers, samples, logprobs))

    def close(self) -> None:
        self._llm.close()


def by_weights(
    run: Path, config: Config, kinds: Sequence[str], versions: Sequence[int], max_tokens: int
) -> Iterator[LibraryAnswers]:
    """Answers by the run's model and adapters, with the base's weights in each of some types of model.weight_dtype.

    The answers of a type must be taken before the next ones are asked for.
    """
    from clif.llm import LLM, load_for

    store = AdapterStore(run)
    folders = {str(version): store.path(version) for version in versions if version}
    adapter = {**config.adapter.model_dump(mode="json"), "serving_slots": max(2, len(folders))}
    engine = config.engine.model_dump(mode="json", exclude={"emulated"})
    engine |= {"max_batch": max(BATCH, config.engine.max_batch), "kv_tokens": "auto"}
    for typed, loaded in load_for(config, kinds):
        model = typed.model.model_dump(mode="json", exclude={"path"})
        llm = LLM(typed.model.path, adapters=folders, model=model, adapter=adapter, engine=engine, loaded=loaded)
        kind = typed.model.weight_dtype
        weights = str(loaded.dtype).removeprefix("torch.") if kind == "auto" else kind
        with closing(LibraryAnswers(llm, weights, max_tokens)) as answers:
            yield answers


class ServerAnswers:
    """Answers by a CLIF server of the run, by the names of its versions. weights: None, only the server knows them."""

    weights = None

    def __init__(self, run: Path, config: Config, endpoint: Endpoint, max_tokens: int) -> None:
        self._endpoint, self._max_tokens = endpoint, max_tokens
        self.tokenizer, self._longest = ChatTokenizer.load(run / TOKENIZER_FOLDER), config.model.max_context

    def answer(self, rows: Sequence[Row], version: int, loss: bool) -> list[Answer]:
        """Raises InputError where the server does not answer, or has not kept the version."""
        model = f"clif@v{version:04d}" if version else "base"
        timeout = httpx.Timeout(SILENT_S, connect=CONNECT_S)
        client = httpx.Client(headers=self._endpoint.headers, timeout=timeout)
        samples = known_answers(rows, self.tokenizer, self._longest) if loss else []
        with client, ThreadPoolExecutor(AT_A_TIME) as threads:
            texts = list(threads.map(lambda row: self._ask(client, model, row), rows))
            read = list(threads.map(lambda sample: self._read(client, model, sample), samples))
        answers = list(map(Answer.of, rows, texts))
        return list(map(with_loss, answers, samples, read)) if loss else answers

    def _ask(self, client: httpx.Client, model: str, row: Row) -> str:
        body = {"messages": row.messages, "max_tokens": self._max_tokens}
        choice = self._choice(client, "chat/completions", {"model": model, **body}, row.id)
        return str(choice["message"]["content"] or "")

    def _read(self, client: httpx.Client, model: str, sample: TrainSample) -> list[float | None]:
        """Log-probabilities of the sample's tokens; None for the first."""
        body = {"prompt": sample.ids, "max_tokens": 1, "echo": True, "logprobs": 0}
        choice = self._choice(client, "completions", {"model": model, **body}, sample.id)
        return list(choice["logprobs"]["token_logprobs"])

    def _choice(self, client: httpx.Client, route: str, body: dict[str, Any], row: int) -> dict[str, Any]:
        url = self._endpoint.url
        try:
            answer = client.post(f"{url}/{route}", json={**body, "temperature": 0})
        except httpx.HTTPError as error:
            raise InputError(f"{url} does not answer ({said(error)})") from error
        if answer.status_code != httpx.codes.OK:
            raise InputError(f"{url} refuses row {row}: {message_of(answer.status_code, answer.content)}")
        tree: Any = msgspec.json.decode(answer.content)
        found: dict[str, Any] = tree["choices"][0]
        return found


def known_answers(rows: Sequence[Row], tokenizer: ChatTokenizer, max_context: int) -> list[TrainSample]:
    """Prompts with their known answers, as training reads them. Raises DataError for one that does not fit."""
    # READ answers with one token.
    return [encode_sample(row, tokenizer, max_context - READ.max_tokens) for row in rows]


def with_loss(answer: Answer, sample: TrainSample, logprobs: Sequence[float | None]) -> Answer:
    """logprobs: of all tokens of the sample, of which those of the known answer count."""
    known = logprobs[sample.target_start : len(sample.ids)]
    loss = -sum(one for one in known if one is not None)
    return msgspec.structs.replace(answer, loss=loss, tokens=sample.targets)
