"""How training shares a replica with serving: one strategy per file. Free of torch."""
