"""Whether a run's metrics can be computed: seen before any rank loads the model. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from clif.config import Config, QualityConfig
from clif.data.heldout import probe_rows, read_data
from clif.data.instruct import Row
from clif.quality.checks import check_schema, passes
from clif.quality.libraries import check_libraries, check_parser, code_language
from clif.quality.work import Answer, ScoringError, Testing


def check_scoring(config: Config) -> None:
    """Raises ScoringError for a missing library, and for rows that cannot be judged."""
    quality = config.quality
    if config.data.path is None or not quality.exact_match_rows:
        return
    check_libraries(quality.metrics)
    try:
        check_rows(probe_rows(read_data(config), config), quality)
    except ScoringError as error:
        raise ScoringError(f"{config.data.path}: {error}") from error


def check_rows(rows: Sequence[Row], quality: QualityConfig) -> None:
    """Raises ScoringError for a schema or a check that is none, and for tests without a command to run them."""
    for row in rows:
        answer = Answer.of(row, "")
        if "json_valid" in quality.metrics:
            check_schema(answer)
        if "codebleu" in quality.metrics:
            language = code_language(row.marks.language, quality.code_language)
            if language is not None:
                check_parser(language)
        if "pass_rate" in quality.metrics:
            passes(answer, Testing())
            if row.marks.test is not None and not quality.test_command:
                raise ScoringError(
                    f"pass_rate runs what a model wrote, and row {row.id} (from 0) has a test: name the command that "
                    "may run it in quality.test_command, or leave pass_rate out"
                )
