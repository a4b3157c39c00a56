"""Clients of any server that speaks OpenAI's protocol. Free of torch, and of the rest of a run."""
