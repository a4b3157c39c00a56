"""Federated rounds as one replica sees them: steps, held-out loss, aggregation, checkpoints."""
