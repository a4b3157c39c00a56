"""`clif eval`: stored adapter versions of a run answer the rows of a file, and are scored. Free of torch.

The answers come from the library in this process, which reads the run's model, or from a server that has it.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, get_args

from msgspec.structs import asdict
from pydantic import ValidationError

from clif.adapters.store import AdapterStore
from clif.config import QUALITY_METRICS, Config, ModelConfig, QualityConfig, QualityMetric
from clif.data.heldout import heldout_parts, probe_rows, read_data
from clif.data.instruct import Row, read_rows, split_rows
from clif.errors import InputError, plain
from clif.quality.check import check_rows
from clif.quality.libraries import check_libraries
from clif.quality.score import score
from clif.quality.work import ALL, Answer, Score, Testing, Work
from clif.storage.run_folder import CONFIG_FILE
from clif.tokenizer import ChatError, ChatTokenizer

READ = {"loss", "perplexity"}
"""Metrics of the known answers, which the model reads."""
TEST = "test"
"""The split that is taken, where rows have it."""
WEIGHTS: tuple[str, ...] = get_args(ModelConfig.model_fields["weight_dtype"].annotation)
"""Values of model.weight_dtype."""


class Answering(Protocol):
    """Answers rows with an adapter version; 0: the base model. loss: that of the known answers is wanted, too.

    weights: the type of the base's; None if it is not known here.
    """

    @property
    def weights(self) -> str | None: ...

    @property
    def tokenizer(self) -> ChatTokenizer: ...

    def answer(self, rows: Sequence[Row], version: int, loss: bool) -> list[Answer]: ...


@dataclass(frozen=True)
class Evaluation:
    """What is asked of `clif eval`. quality: of the run's configuration, with what the command changes.

    max_tokens: of the longest answer.
    """

    config: Config
    rows: Sequence[Row]
    versions: Sequence[int]
    metrics: tuple[QualityMetric, ...]
    seed: int
    max_tokens: int

    def check(self) -> None:
        """Raises InputError before the model is loaded."""
        check_libraries(self.metrics)
        check_rows(self.rows, self.config.quality.model_copy(update={"metrics": self.metrics}))

    def run(self, several: Iterable[Answering]) -> dict[str, Any]:
        """`versions` and `groups`, as in the summary of a run, with `weights` where they are known; `left_out`.

        Raises InputError if no row fits the model's context.
        """
        versions, groups, left_out = list[dict[str, Any]](), list[dict[str, Any]](), list[str]()
        for answering in several:
            rows, left_out = fitting(self.rows, answering.tokenizer, self.config.model.max_context, self.max_tokens)
            weights = {} if answering.weights is None else {"weights": answering.weights}
            for version in self.versions:
                scores = score(self._work(version, answering.answer(rows, version, self._reads)))
                versions.append({"version": version, **weights, "scores": _of(scores, ALL, "")})
                for group, name in sorted({(one.group, one.name) for one in scores if one.group != ALL}):
                    line = {"group": group, "name": name, "version": version, **weights}
                    groups.append({**line, "scores": _of(scores, group, name)})
        # What one version loses by other weights is read line by line.
        versions.sort(key=lambda line: self.versions.index(line["version"]))
        groups.sort(key=lambda line: (line["group"], line["name"], line["version"]))
        return {"versions": versions, "groups": groups, "left_out": left_out}

    @property
    def _reads(self) -> bool:
        return bool(READ.intersection(self.metrics))

    def _work(self, version: int, answers: Sequence[Answer]) -> Work:
        quality = self.config.quality
        return Work(
            version=version,
            metrics=self.metrics,
            answers=tuple(answers),
            seed=self.seed,
            code_language=quality.code_language,
            testing=Testing(command=quality.test_command, timeout_s=quality.test_timeout_s),
        )


def read_run(run: Path) -> Config:
    """The configuration of a run. Raises InputError."""
    try:
        return Config.model_validate_json((run / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{run} is not the folder of a run: its {CONFIG_FILE} cannot be read") from error


def with_test_command(config: Config, words: str) -> Config:
    """The configuration with another quality.test_command, as in a shell. Raises InputError for one that names no file
    of the answer."""
    try:
        command = tuple(shlex.split(words))
        quality = QualityConfig.model_validate({**config.quality.model_dump(), "test_command": command})
    except ValidationError as error:
        raise InputError(f"--test-command: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
    except ValueError as error:
        raise InputError(f"--test-command {plain(words, 60)!r} is no command ({error}): correct it") from error
    return config.model_copy(update={"quality": quality})


def choose_metrics(names: Sequence[str]) -> tuple[QualityMetric, ...]:
    """Names, also several in one, with commas. Raises InputError, with the known names, for another one."""
    asked = [name.strip() for part in names for name in part.split(",") if name.strip()]
    for name in asked:
        if name not in QUALITY_METRICS:
            raise InputError(f"{plain(name, 40)!r} is no metric: choose among {', '.join(QUALITY_METRICS)}")
    return cast(tuple[QualityMetric, ...], tuple(dict.fromkeys(asked)))


def choose_versions(run: Path, asked: Sequence[int]) -> list[int]:
    """The asked ones, by default the base and the active version. Raises InputError for one that is not stored."""
    store = AdapterStore(run)
    stored = [version.number for version in store.committed()]
    for version in asked:
        if version and version not in stored:
            known = ", ".join(map(str, stored)) or "none"
            raise InputError(f"version {version} is not stored in {store.folder}: 0 is the base, and there are {known}")
    current = store.current()
    return list(dict.fromkeys(asked)) if asked else [0, *([] if current is None else [current.number])]


def choose_weights(names: Sequence[str], config: Config) -> tuple[str, ...]:
    """Values of model.weight_dtype, also several in one, with commas; by default the run's. Raises InputError."""
    asked = dict.fromkeys(name.strip() for part in names for name in part.split(",") if name.strip())
    for name in asked:
        if name not in WEIGHTS:
            raise InputError(f"--weight-dtype {plain(name, 40)!r} is not known: choose among {', '.join(WEIGHTS)}")
    return tuple(asked) or (config.model.weight_dtype,)


def choose_rows(data: Path | None, config: Config, split: str | None, most: int | None, seed: int) -> list[Row]:
    """Rows of a split; by default those of `test`, or all if no row has that.

    data: None for the run's own, of which the default are the rows that its quality is measured on. Raises InputError.
    """
    if data is None and config.data.path is None:
        raise InputError("this run has no data of its own (data.path): name a file of rows with --data")
    every = read_data(config) if data is None else read_rows(data)
    if split is not None:
        rows = split_rows(every, split)
    elif data is None:
        rows = probe_rows(every, config) or [*heldout_parts(every, config).report]
    else:
        rows = [row for row in every if row.split == TEST] or every
    if most is not None and most < len(rows):
        rows = random.Random(seed).sample(rows, most)
    return sorted(rows, key=lambda row: row.id)


def fitting(
    rows: Sequence[Row], tokenizer: ChatTokenizer, max_context: int, max_tokens: int
) -> tuple[list[Row], list[str]]:
    """Rows whose prompts leave room for an answer and for the known one, and why each of the others does not.

    Raises InputError if none fits.
    """
    kept, reasons = list[Row](), list[str]()
    for row in rows:
        reason = _misfit(row, tokenizer, max_context, max_tokens)
        kept += [row] if reason is None else []
        reasons += [] if reason is None else [f"row {row.id} (from 0): {reason}"]
    if not kept:
        raise InputError(f"none of the {len(rows)} rows can be scored; {reasons[0]}")
    return kept, reasons


def _misfit(row: Row, tokenizer: ChatTokenizer, max_context: int, max_tokens: int) -> str | None:
    try:
        prompt, known = len(tokenizer.encode_chat(row.messages)), len(tokenizer.encode_answer(row.answer))
    except ChatError as error:
        return str(error)
    if not prompt or known < 2:
        return "its prompt or its answer encodes to nothing"
    # The known answer is read as a prompt that is answered with one token.
    if prompt + max(max_tokens, known + 1) > max_context:
        return (
            f"its prompt of {prompt} tokens and an answer of up to {max_tokens}, or the known one of {known}, exceed "
            f"the run's model.max_context {max_context}"
        )
    return None


def _of(scores: Iterable[Score], group: str, name: str) -> dict[str, dict[str, Any]]:
    return {one.metric: _figures(one) for one in scores if (one.group, one.name) == (group, name)}


def _figures(one: Score) -> dict[str, Any]:
    return {name: value for name, value in asdict(one).items() if name in ("value", "low", "high", "count")}
