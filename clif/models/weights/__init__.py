"""Weights from files: Hugging Face folders, GGUF, one shard of them, or drawn at random."""
