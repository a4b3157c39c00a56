"""One step of a replica: scheduling, cache, forward, sampling, and the cost of it."""
