"""Whether one answer is right: by its label, as JSON, by a row's check, and by a row's test.

A row's test is run by the operator's command only. CLIF itself runs nothing that a model wrote.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

from clif.quality.libraries import library
from clif.quality.work import Answer, ScoringError, Testing

_EDGES = " \t\"'`*.,;:!?"
FILES = ("answer", "test", "program")


def expected_label(answer: Answer) -> str | None:
    """The row's known answer if that is one line, otherwise its label; None: it has neither."""
    # Many data sets number their classes in this field, and the model learns to write the answer.
    return answer.marks.label if "\n" in answer.reference.strip() else answer.reference


def same_label(text: str, label: str) -> bool:
    """Whether the first line of an answer is the label, whatever their case, width, spaces and marks at the ends."""
    lines = text.strip().splitlines()
    return bool(lines) and _normal(lines[0]) == _normal(label)


def holds_json(answer: Answer) -> bool:
    """Whether JSON is expected: the row has a schema, or its known answer is an object or a list."""
    return answer.marks.schema is not None or isinstance(_parsed(answer.reference), dict | list)


def valid_json(answer: Answer) -> bool:
    """Whether the answer is JSON, and of the row's schema if it has one. Raises ScoringError as check_schema() does."""
    validator = check_schema(answer)
    try:
        value = _strict(answer.text)
    except (ValueError, RecursionError):
        return False
    return validator is None or bool(validator.is_valid(value))


def check_schema(answer: Answer) -> Any:
    """A validator by the row's schema; None: it has none. Raises ScoringError for what is no schema.

    Nothing is fetched for a schema that refers to another one by its address.
    """
    if answer.marks.schema is None:
        return None
    rust = library("json_valid")
    try:
        return rust.validator_for(answer.marks.schema, retriever=_refuse)
    except (rust.ValidationError, rust.ReferencingError, ValueError) as error:
        raise ScoringError(
            f'row {answer.row} (from 0): its "schema" is no JSON schema that stands alone: correct it'
        ) from error


def passes(answer: Answer, testing: Testing) -> bool | None:
    """Whether the answer passes the row's check, and its test where a command is given; None: it has neither.

    Raises ScoringError for a check that is no regular expression, and for a command that cannot be started.
    """
    results = []
    if answer.marks.check is not None:
        results.append(_matches(answer.marks.check, answer))
    if answer.marks.test is not None and testing.command:
        results.append(all(results) and run_test(answer.text, answer.marks.test, testing))
    return all(results) if results else None


def run_test(text: str, test: str, testing: Testing) -> bool:
    """Run the operator's command on an answer and a test, in a folder of their own. Raises ScoringError."""
    with tempfile.TemporaryDirectory(prefix="clif-test-") as name:
        folder = Path(name)
        contents = {"answer": text, "test": test, "program": f"{text}\n{test}\n"}
        for file, content in contents.items():
            (folder / file).write_text(content)
        paths = {"folder": name, **{file: str(folder / file) for file in FILES}}
        command = [_filled(word, paths) for word in testing.command]
        return _exit_status(command, folder, testing.timeout_s) == 0


def _exit_status(command: list[str], folder: Path, timeout_s: float) -> int | None:
    """None: it took too long, and was killed with all of its group."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "LANG": "C.UTF-8"}
    null = subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=null, stdout=null, stderr=null, start_new_session=True
        )
    except OSError as error:
        raise ScoringError(
            f"quality.test_command cannot be started ({error.strerror}): {command[0]}: correct it"
        ) from error
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also what the command left running.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _filled(word: str, paths: dict[str, str]) -> str:
    for name, path in paths.items():
        word = word.replace(f"{{{name}}}", path)
    return word


def _matches(check: str, answer: Answer) -> bool:
    try:
        return re.search(check, answer.text) is not None
    except re.error as error:
        raise ScoringError(
            f'row {answer.row} (from 0): its "check" is no regular expression ({error}): correct it'
        ) from error


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().strip(_EDGES).split())


def _parsed(text: str) -> Any:
    try:
        return _strict(text)
    except (ValueError, RecursionError):
        return None


def _strict(text: str) -> Any:
    """Raises ValueError, also for NaN and Infinity, which Python's parser takes."""
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _refuse(address: str) -> None:
    raise ValueError(address)
