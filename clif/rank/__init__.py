"""What one process does, from its start to its exit code."""
