"""Keys and values of the configuration that have a new name, as data. Free of torch.

The old name is refused with the new one and never read in its place: one name for one thing.
"""

from __future__ import annotations

KEYS: dict[str, str] = {
    "engine.pack_weights": "engine.prepack_weights",
    "engine.beside_slice_ms": "engine.concurrent_slice_ms",
}
"""Old key, as section.key, to the new one."""
VALUES: dict[tuple[str, str], str] = {
    ("engine.coserving", "mixed"): "fused",
    ("engine.coserving", "beside"): "concurrent",
    ("engine.coserving", "turns"): "interleaved",
}
"""Key, as it is named now, and old value to the new value."""


def new_key(key: str) -> str | None:
    """The new name of a key that was renamed, as section.key; None for any other."""
    return KEYS.get(key)


def new_value(key: str, value: object) -> str | None:
    """The new name of a value of a key that was renamed; None for any other."""
    return VALUES.get((key, value)) if isinstance(value, str) else None
