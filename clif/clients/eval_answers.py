"""Where the answers of `clif eval` come from: the library in this process, or a server. torch is imported when used."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from clif.adapters.store import AdapterStore
from clif.clients.endpoint import CONNECT_S, Endpoint, message_of, said
from clif.config import Config
from clif.data.instruct import Row
from clif.errors import InputError
from clif.quality.work import Answer

AT_A_TIME = 8
SILENT_S = 300.0


class LibraryAnswers:
    """Answers by `clif.LLM`, with the run's model, precision and adapters. Close it, or use it in a `with` block."""

    def __init__(self, run: Path, config: Config, versions: Sequence[int], max_tokens: int) -> None:
        from clif.llm import LLM
        from clif.types import Sampling

        store = AdapterStore(run)
        folders = {str(version): store.path(version) for version in versions if version}
        model = config.model.model_dump(mode="json", exclude={"path"})
        adapter = {**config.adapter.model_dump(mode="json"), "serving_slots": max(2, len(folders))}
        engine = config.engine.model_dump(mode="json", exclude={"emulated"})
        self._llm = LLM(config.model.path, adapters=folders, model=model, adapter=adapter, engine=engine)
        self._sampling = Sampling(max_tokens=max_tokens)

    def answer(self, rows: Sequence[Row], version: int) -> list[Answer]:
        """Raises InputError for a row that does not fit the longest context."""
        prompts = [row.messages for row in rows]
        found = self._llm.generate(prompts, self._sampling, str(version) if version else None)
        return [Answer.of(row, one.text) for row, one in zip(rows, found, strict=True)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._llm.close()


class ServerAnswers:
    """Answers by a CLIF server of the run, by the names of its versions."""

    def __init__(self, endpoint: Endpoint, max_tokens: int) -> None:
        self._endpoint, self._max_tokens = endpoint, max_tokens

    def answer(self, rows: Sequence[Row], version: int) -> list[Answer]:
        """Raises InputError where the server does not answer, or has not kept the version."""
        model = f"clif@v{version:04d}" if version else "base"
        timeout = httpx.Timeout(SILENT_S, connect=CONNECT_S)
        client = httpx.Client(headers=self._endpoint.headers, timeout=timeout)
        with client, ThreadPoolExecutor(AT_A_TIME) as threads:
            texts = list(threads.map(lambda row: self._ask(client, model, row), rows))
        return [Answer.of(row, text) for row, text in zip(rows, texts, strict=True)]

    def _ask(self, client: httpx.Client, model: str, row: Row) -> str:
        body = {"model": model, "messages": row.messages, "max_tokens": self._max_tokens, "temperature": 0}
        try:
            answer = client.post(f"{self._endpoint.url}/chat/completions", json=body)
        except httpx.HTTPError as error:
            raise InputError(f"{self._endpoint.url} does not answer ({said(error)})") from error
        if answer.status_code != httpx.codes.OK:
            raise InputError(
                f"{self._endpoint.url} refuses row {row.id}: {message_of(answer.status_code, answer.content)}"
            )
        tree: Any = msgspec.json.decode(answer.content)
        return str(tree["choices"][0]["message"]["content"] or "")
