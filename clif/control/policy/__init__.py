"""Decisions as pure functions (now, view, config) -> (decision, reason). Free of torch."""
