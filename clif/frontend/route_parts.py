"""What routes work with."""

from __future__ import annotations

from dataclasses import dataclass, field

from clif.config import Config
from clif.frontend.history import History
from clif.frontend.link import Link
from clif.frontend.recent_answers import RecentAnswers
from clif.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Parts:
    """link: to the control process. history: of its status; a task of the process fills it. recent: the last answers,
    where feedback is allowed."""

    config: Config
    link: Link
    tokenizer: ChatTokenizer
    history: History = field(default_factory=History)
    recent: RecentAnswers = field(default_factory=lambda: RecentAnswers(0, 1.0))
