"""Which better answers are kept as training samples: checks that need no language and no model. Free of torch.

They keep out what is surely no answer, and what must not be learned by heart. They judge neither truth nor manners: the
gate does, which compares every version on held-out rows before it answers a request.
"""

from __future__ import annotations

import re
import unicodedata
import zlib

REPEATED_BYTES, MOST_COMPRESSED = 256, 8.0
"""A text of so many bytes that zlib makes shorter than an eighth says the same again and again; prose gives about 2."""
SECRETS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:sk|clif)-[A-Za-z0-9_-]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
)
"""Private keys and access tokens of wide-spread kinds."""
_ALLOWED = frozenset("\n\t\r")


def objection(answer: str, given: str | None = None) -> str:
    """Why an answer is not kept; empty: it is. given: the answer that it is better than, if that is known."""
    if not answer.strip():
        return "the answer is empty"
    if given is not None and answer.strip() == given.strip():
        return "the answer equals the one that was given: send rating=up instead"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Cn") and c not in _ALLOWED for c in answer):
        return "the answer holds control characters, or code points that are no characters"
    content = answer.encode()
    if len(content) >= REPEATED_BYTES and len(content) > MOST_COMPRESSED * len(zlib.compress(content)):
        return "the answer repeats itself"
    if SECRETS.search(answer):
        return "the answer holds what looks like a key or an access token"
    return ""
