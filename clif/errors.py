"""Errors that a user can mend: their base, and that of the configuration."""


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what to change. Shown without a traceback."""


class ConfigError(InputError):
    """The configuration cannot be honoured; the message says what to change."""
