"""Errors that a user can correct: their base class, and that of the configuration."""


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what to change. Shown without a traceback."""


class ConfigError(InputError):
    """The configuration cannot be honoured; the message says what to change."""


def plain(given: object, longest: int = 400) -> str:
    """A given value, fit for a sentence: on one line, printable, cut in the middle if it is long."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(given))
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
