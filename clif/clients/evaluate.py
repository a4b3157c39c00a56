"""`clif eval`: stored adapter versions of a run answer the rows of a file, and are scored. Free of torch.

The answers come from the library in this process, which reads the run's model, or from a server that has it.
"""

from __future__ import annotations

import random
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from msgspec.structs import asdict
from pydantic import ValidationError

from clif.adapters.store import AdapterStore
from clif.config import QUALITY_METRICS, Config, QualityConfig, QualityMetric
from clif.data.instruct import Row, read_rows, split_rows
from clif.errors import InputError, plain
from clif.quality.check import check_rows
from clif.quality.libraries import check_libraries
from clif.quality.score import score
from clif.quality.work import ALL, Answer, Score, Testing, Work
from clif.storage.run_folder import CONFIG_FILE

READ = {"loss", "perplexity"}
"""Metrics of the known answers, which the model reads."""
TEST = "test"
"""The split that is taken, where rows have it."""


class Answering(Protocol):
    """Answers rows with an adapter version; 0: the base model. loss: that of the known answers is wanted, too."""

    def answer(self, rows: Sequence[Row], version: int, loss: bool) -> list[Answer]: ...


@dataclass(frozen=True)
class Evaluation:
    """What is asked of `clif eval`. quality: of the run's configuration, with what the command changes."""

    config: Config
    rows: Sequence[Row]
    versions: Sequence[int]
    metrics: tuple[QualityMetric, ...]
    seed: int

    def check(self) -> None:
        """Raises InputError before the model is loaded."""
        check_libraries(self.metrics)
        check_rows(self.rows, self.config.quality.model_copy(update={"metrics": self.metrics}))

    def run(self, answering: Answering) -> dict[str, Any]:
        """`versions` and `groups`, as in the summary of a run."""
        versions, groups = list[dict[str, Any]](), list[dict[str, Any]]()
        for version in self.versions:
            scores = score(
                self._work(version, answering.answer(self.rows, version, bool(READ.intersection(self.metrics))))
            )
            versions.append({"version": version, "scores": _by_metric(one for one in scores if one.group == ALL)})
            names = sorted({(one.group, one.name) for one in scores if one.group != ALL})
            for group, name in names:
                mine = _by_metric(one for one in scores if (one.group, one.name) == (group, name))
                groups.append({"group": group, "name": name, "version": version, "scores": mine})
        groups.sort(key=lambda line: (line["group"], line["name"], line["version"]))
        return {"versions": versions, "groups": groups}

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


def choose_rows(data: Path, split: str | None, most: int | None, seed: int) -> list[Row]:
    """Rows of a split; by default those of `test`, or all if no row has that. Raises DataError."""
    every = read_rows(data)
    rows = [row for row in every if row.split == TEST] or every
    if split is not None:
        rows = split_rows(every, split)
    if most is not None and most < len(rows):
        rows = random.Random(seed).sample(rows, most)
    return sorted(rows, key=lambda row: row.id)


def _by_metric(scores: Any) -> dict[str, dict[str, Any]]:
    return {one.metric: _figures(one) for one in scores}


def _figures(one: Score) -> dict[str, Any]:
    return {name: value for name, value in asdict(one).items() if name in ("value", "low", "high", "count")}
