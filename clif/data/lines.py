"""Reads the lines of text files, and the JSON objects on them. Free of torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clif.errors import InputError, plain

# Alternatives: an escaped backslash, a complete pair, and a lone surrogate. Only the last one is a group.
_HALF = re.compile(r"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)")


def read_lines(path: Path, error: type[ValueError]) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines of a UTF-8 file, blank ones left out.

    Raises `error` if it cannot be read or is not UTF-8.
    """
    try:
        # Not splitlines(): it also splits at U+2028 and its like, which JSON allows inside strings.
        with path.open(encoding="utf-8-sig") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text: convert it") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror}): name a file that can") from cause


def json_object(line: str, unique: bool = False) -> dict[str, Any]:
    """The JSON object on a line. All of its text can be encoded. Raises InputError, without the position.

    unique: refuse an object that names a key twice, of which Python's parser keeps the last.
    """
    try:
        value = json.loads(line, object_pairs_hook=_unique if unique else None)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON ({error.msg} at column {error.colno}): write one object a line") from error
    except RecursionError as error:
        raise InputError("nested too deeply: write one object a line, without more depth than it needs") from error
    except ValueError as error:
        # Python refuses integers of more than some thousand digits.
        raise InputError(f"holds a number that is too large ({error}): correct it") from error
    if not isinstance(value, dict):
        raise InputError(f"a {type(value).__name__} instead of an object: write one object a line")
    if half := next((match[1] for match in _HALF.finditer(line) if match[1]), None):
        raise InputError(f"{half} is half of a character (a lone surrogate) and no text: remove it or add its half")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f'the key "{plain(twice, 40)}" stands twice in an object: remove one')
    return found
