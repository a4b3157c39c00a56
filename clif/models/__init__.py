"""Base models: their shape, their layers with dual adapters, and how they are cut over ranks."""
