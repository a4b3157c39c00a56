"""The base of all errors that a user can mend."""


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what to change. Shown without a traceback."""
