"""What routes work with."""

from __future__ import annotations

from dataclasses import dataclass

from clif.config import Config
from clif.frontend.link import Link
from clif.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Parts:
    """link: to the control process."""

    config: Config
    link: Link
    tokenizer: ChatTokenizer
