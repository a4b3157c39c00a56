"""LoRA adapters: the dual layer, the slots, the shadow, federation and the PEFT format."""
