"""The order in which events reach the calls that wait for them."""

from __future__ import annotations

from clif.frontend.streams import first_tokens_first
from clif.types import FinishReason, TokenEvent


def test_first_tokens_come_before_others_and_the_events_of_a_request_keep_their_order():
    events = [
        TokenEvent(request_id=1, tokens=(5,)),
        TokenEvent(request_id=2, tokens=(6,)),
        TokenEvent(request_id=1, tokens=(7,), finish=FinishReason.LENGTH),
        TokenEvent(request_id=2, tokens=(8,), finish=FinishReason.LENGTH),
    ]
    ordered = first_tokens_first(events, {2})
    assert [(event.request_id, event.tokens) for event in ordered] == [(2, (6,)), (2, (8,)), (1, (5,)), (1, (7,))]
