"""LoRA adapters: the bank of slots, PEFT's format in and out, the versions on disk."""
