"""Base models: loading, and taking them apart into resumable pieces."""
