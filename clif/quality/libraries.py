"""The libraries behind metrics: imported when a metric is asked for, and missed in one sentence."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from importlib.util import find_spec
from types import ModuleType
from typing import get_args

from clif.config import CodeLanguage, QualityMetric
from clif.quality.work import ScoringError

MODULES: dict[QualityMetric, tuple[str, str]] = {
    "bleu": ("sacrebleu", "sacrebleu"),
    "chrf": ("sacrebleu", "sacrebleu"),
    "rouge": ("rouge_score", "clif[quality]"),
    "codebleu": ("codebleu", "clif[quality]"),
    "json_valid": ("jsonschema_rs", "jsonschema-rs"),
}
"""Module, and what brings it."""


CODE_LANGUAGES = get_args(CodeLanguage)
CODE_NAMES = {"c++": "cpp", "c#": "c_sharp", "csharp": "c_sharp", "golang": "go", "js": "javascript", "py": "python"}
"""Other names of these."""


def check_libraries(metrics: Iterable[QualityMetric]) -> None:
    """Raises ScoringError for a metric whose library is not installed; nothing is imported."""
    for metric in metrics:
        module, package = MODULES.get(metric, ("", ""))
        if module and find_spec(module) is None:
            raise ScoringError(_missing(metric, package))


def library(metric: QualityMetric, module: str = "") -> ModuleType:
    """The library of a metric, or a module inside of it. Raises ScoringError where it is not installed."""
    top, package = MODULES[metric]
    try:
        return importlib.import_module(f"{top}.{module}" if module else top)
    except ModuleNotFoundError as error:
        raise ScoringError(_missing(metric, package)) from error


def code_language(named: str | None, default: str) -> str | None:
    """The language of a row's code as CodeBLEU calls it; None: a row names one that it does not know."""
    if named is None:
        return default
    name = re.sub(r"[\s_-]", "", named.casefold())
    return CODE_NAMES.get(name, name if name in CODE_LANGUAGES else None)


def check_parser(language: str) -> None:
    """Raises ScoringError where CodeBLEU cannot read a language here."""
    if find_spec(f"tree_sitter_{language}") is None:
        package = f"tree-sitter-{language.replace('_', '-')}"
        raise ScoringError(
            f"codebleu needs {package} to read {language}: python -m pip install {package}, or leave codebleu out"
        )


def _missing(metric: str, package: str) -> str:
    return f'{metric} needs a library that is not installed: python -m pip install "{package}", or leave {metric} out'
