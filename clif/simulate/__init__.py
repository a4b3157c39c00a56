"""Virtual time: the real control server with simulated replicas, as fast as it computes. Free of torch."""
