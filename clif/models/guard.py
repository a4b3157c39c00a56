"""Errors of transformers over files of a user, as one sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clif.errors import ConfigError, InputError

log = logging.getLogger(__name__)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Wrap calls of transformers and safetensors that read `what`. Raises ConfigError for every error of theirs.

    They raise errors of every type for missing and damaged files: no list of types would be complete.
    """
    try:
        yield
    except InputError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(f"{what} does not fit the memory here: choose a smaller model or more ranks") from error
    except Exception as error:
        log.debug("%s cannot be loaded", what, exc_info=True)
        raise ConfigError(f"{what} cannot be loaded ({_reason(error)}): correct it or get it again") from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A KeyError's text is the key alone.
    bare = not lines or isinstance(error, LookupError)
    return f"{type(error).__name__}: {' '.join(lines[:1])[:200]}" if bare else lines[0][:200]
