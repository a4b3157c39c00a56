"""The control plane, a process of its own beside rank 0. Free of torch."""
